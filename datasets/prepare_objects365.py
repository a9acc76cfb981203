"""The command of maskdino/cli/prepare/objects365.py, for those who have the repository."""

import sys

from maskdino.cli.prepare.objects365 import main

if __name__ == "__main__":
    sys.exit(main())
