"""The command of maskdino/cli/prepare/ade20k.py, for those who have the repository."""

import sys

from maskdino.cli.prepare.ade20k import main

if __name__ == "__main__":
    sys.exit(main())
