"""The command of maskdino/cli/train_custom.py, for those who have the repository."""

from maskdino.cli.train_custom import main

if __name__ == "__main__":
    raise SystemExit(main())
