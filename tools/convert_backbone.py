"""The command of maskdino/cli/convert_backbone.py, for those who have the repository."""

from maskdino.cli.convert_backbone import main

if __name__ == "__main__":
    raise SystemExit(main())
