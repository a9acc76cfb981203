"""The command of maskdino/cli/visualize.py, for those who have the repository."""

from maskdino.cli.visualize import main

if __name__ == "__main__":
    raise SystemExit(main())
