"""The command of maskdino/cli/prepare/objects365.py, for those who have the repository."""

from maskdino.cli.prepare.objects365 import main

if __name__ == "__main__":
    raise SystemExit(main())
