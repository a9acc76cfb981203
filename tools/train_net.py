"""The command of maskdino/cli/train.py, for those who have the repository."""

import sys

from maskdino.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
