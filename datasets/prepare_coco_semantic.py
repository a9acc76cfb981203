"""The command of maskdino/cli/prepare/coco_semantic.py, for those who have the repository."""

from maskdino.cli.prepare.coco_semantic import main

if __name__ == "__main__":
    raise SystemExit(main())
