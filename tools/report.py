"""The command of maskdino/cli/report.py, for those who have the repository."""

from maskdino.cli.report import main

if __name__ == "__main__":
    raise SystemExit(main())
