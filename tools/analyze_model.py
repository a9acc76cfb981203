"""The command of maskdino/cli/analyze.py, for those who have the repository."""

from maskdino.cli.analyze import main

if __name__ == "__main__":
    raise SystemExit(main())
