"""The command of maskdino/cli/plot_metrics.py, for those who have the repository."""

from maskdino.cli.plot_metrics import main

if __name__ == "__main__":
    raise SystemExit(main())
