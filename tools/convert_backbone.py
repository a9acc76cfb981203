"""The command of maskdino/cli/convert_backbone.py, for those who have the repository."""

import sys

from maskdino.cli.convert_backbone import main

if __name__ == "__main__":
    sys.exit(main())
