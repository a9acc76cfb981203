"""The command of maskdino/cli/report.py, for those who have the repository."""

import sys

from maskdino.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
