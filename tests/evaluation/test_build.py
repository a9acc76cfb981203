"""Evaluators by name, beside those of a dataset's type, and what they are known to measure."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from maskdino.config import load_config
from maskdino.evaluation.build import build_evaluator, check_evaluators, known_metrics
from maskdino.evaluation.coco import COCOInstanceEvaluator
from maskdino.integration.extensions import EVALUATOR_REGISTRY


class Own(DatasetEvaluator):
    """Remembers what it was made for."""

    def __init__(self, cfg: CfgNode, dataset_name: str, output_folder: str) -> None:
        self.seed, self.dataset_name, self.folder = cfg.SEED, dataset_name, output_folder


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EVALUATOR_REGISTRY, "_obj_map", dict(EVALUATOR_REGISTRY._obj_map))
    EVALUATOR_REGISTRY.register(Own, name="own")


@pytest.fixture(params=["own", None])
def untyped(request: pytest.FixtureRequest) -> str:
    """A dataset whose type is none of ours."""
    metadata = MetadataCatalog.get("untyped")
    if request.param:
        metadata.set(evaluator_type=request.param)
    return "untyped"


def config(folder: Path, *names: str) -> CfgNode:
    return load_config(
        None, ["OUTPUT_DIR", str(folder), "SEED", "9", "TEST.EVALUATORS", str(list(names))]
    )


def test_own_evaluator_stands_beside_that_of_the_type(tmp_path: Path) -> None:
    first, second = build_evaluator(config(tmp_path, "own"), "nuclei_val")._evaluators
    assert type(first) is COCOInstanceEvaluator
    assert (second.seed, second.dataset_name) == (9, "nuclei_val")
    assert second.folder == str(tmp_path / "inference" / "nuclei_val")


def test_own_evaluator_of_a_dataset_of_no_known_type(tmp_path: Path, untyped: str) -> None:
    # Named by the dataset, by the key, or by both.
    evaluators = build_evaluator(config(tmp_path, "own"), untyped)._evaluators
    assert [type(evaluator) for evaluator in evaluators] == [Own]
    cfg = config(tmp_path)
    cfg.DATASETS.TEST = (untyped,)
    if MetadataCatalog.get(untyped).get("evaluator_type") == "own":
        check_evaluators(cfg)
    else:
        with pytest.raises(ValueError, match="evaluator type None.*TEST.EVALUATORS"):
            check_evaluators(cfg)


def test_unknown_name(tmp_path: Path) -> None:
    cfg = config(tmp_path, "onw")
    cfg.DATASETS.TEST = ("nuclei_val",)
    with pytest.raises(ValueError, match="TEST.EVALUATORS names 'onw'.* own.*--import"):
        check_evaluators(cfg)


def test_known_metrics(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    known = known_metrics(cfg, "nuclei_val")
    assert {"bbox/AP", "segm/AP", "segm/AP75"} <= set(known)
    cfg.MODEL.MASK_DINO.MASK_ON = False
    assert not any(name.startswith("segm/") for name in known_metrics(cfg, "nuclei_val"))
    assert known_metrics(config(tmp_path, "own"), "nuclei_val") is None
