"""The command of maskdino/cli/prepare/instances_from_panoptic.py, in a repository."""

from maskdino.cli.prepare.instances_from_panoptic import main

if __name__ == "__main__":
    raise SystemExit(main())
