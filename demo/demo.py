"""The command of maskdino/cli/predict.py, for those who have the repository."""

import sys

from maskdino.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
