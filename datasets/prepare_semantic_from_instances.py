"""The command of maskdino/cli/prepare/semantic_from_instances.py, in a repository."""

from maskdino.cli.prepare.semantic_from_instances import main

if __name__ == "__main__":
    raise SystemExit(main())
