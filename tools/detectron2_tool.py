r"""Runs a command of detectron2's own repository, unchanged, on our configurations.

python tools/detectron2_tool.py /path/to/detectron2/tools/analyze_model.py \
    --config-file configs/coco/instance/maskdino_R50.yaml --tasks flop
"""

import runpy
import sys
from pathlib import Path

import detectron2.config
import detectron2.engine.defaults
import detectron2.solver
from detectron2.config import CfgNode

import maskdino

original, freeze = detectron2.config.get_cfg, CfgNode.freeze


def adapt_and_freeze(cfg: CfgNode) -> None:
    """Adapts to detectron2's trainer after the last file and override, which freezing follows."""
    if not cfg.is_frozen():
        maskdino.adapt_to_detectron2(cfg)
    freeze(cfg)


def get_cfg() -> CfgNode:
    """Detectron2's defaults and ours."""
    cfg = original()
    maskdino.add_maskdino_config(cfg)
    return cfg


if __name__ == "__main__":
    detectron2.config.get_cfg, CfgNode.freeze = get_cfg, adapt_and_freeze
    for module in (detectron2.solver, detectron2.engine.defaults):
        module.build_optimizer = maskdino.build_optimizer
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
