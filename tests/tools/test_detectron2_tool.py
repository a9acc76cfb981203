"""Commands of detectron2's repository on our configurations, with a command in their shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMMAND = """
import sys
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
import neighbor

cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
cfg.merge_from_list(sys.argv[2:])
cfg.freeze()
model = build_model(cfg)
print(type(model).__name__, type(build_optimizer(cfg, model)).__name__)
print(cfg.MODEL.DEVICE, cfg.MODEL.MASK_ON, cfg.INPUT.RANDOM_FLIP, cfg.is_frozen(), neighbor.NAME)
"""


def test_command_runs_unchanged(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "neighbor.py").write_text("NAME = 'beside it'\n")
    config = repository / "configs" / "nuclei" / "instance" / "maskdino_tiny.yaml"
    launcher = repository / "tools" / "detectron2_tool.py"
    command = [sys.executable, launcher, tmp_path / "command.py", config, "MODEL.DEVICE", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "MaskDINO AdamW",
        "cpu True horizontal True beside it",
    ]
