"""The command of maskdino/cli/visualize.py, for those who have the repository."""

import sys

from maskdino.cli.visualize import main

if __name__ == "__main__":
    sys.exit(main())
