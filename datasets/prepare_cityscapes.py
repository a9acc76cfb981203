"""The command of maskdino/cli/prepare/cityscapes.py, for those who have the repository."""

from maskdino.cli.prepare.cityscapes import main

if __name__ == "__main__":
    raise SystemExit(main())
