"""The command of maskdino/cli/prepare/ade20k.py, for those who have the repository."""

from maskdino.cli.prepare.ade20k import main

if __name__ == "__main__":
    raise SystemExit(main())
