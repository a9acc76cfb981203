"""A project: `--import my_project.py` imports its parts, which lie beside this file."""

import dataset  # noqa: F401 - registers
import evaluator
import mapper
from detectron2.config import CfgNode


def add_config(cfg: CfgNode) -> None:
    """Adds the keys of the parts."""
    evaluator.add_config(cfg)
    mapper.add_config(cfg)
