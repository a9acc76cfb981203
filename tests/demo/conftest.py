"""Fixtures of the demo's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maskdino.model import MaskDINO
from tests.helpers import tiny_cfg


@pytest.fixture(autouse=True)
def _demo_on_path(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    """The modules of the demo import one another as scripts do."""
    monkeypatch.syspath_prepend(str(repository / "demo"))


@pytest.fixture(scope="module")
def model_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command line of a narrow model with random weights."""
    folder = tmp_path_factory.mktemp("model")
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": MaskDINO(cfg).state_dict()}, folder / "weights.pth")
    words = ["--config-file", str(folder / "config.yaml"), "--confidence-threshold", "0"]
    return [*words, "--max-detections", "2", "--opts", "MODEL.WEIGHTS", str(folder / "weights.pth")]
