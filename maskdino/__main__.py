"""`python -m maskdino`: the command `maskdino`."""

import sys

from maskdino.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
