"""The command of maskdino/cli/export.py, for those who have the repository."""

from maskdino.cli.export import main

if __name__ == "__main__":
    raise SystemExit(main())
