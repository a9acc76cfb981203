"""The command of maskdino/cli/train.py, for those who have the repository."""

from maskdino.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
