"""The command of maskdino/cli/prepare/cityscapes.py, for those who have the repository."""

import sys

from maskdino.cli.prepare.cityscapes import main

if __name__ == "__main__":
    sys.exit(main())
