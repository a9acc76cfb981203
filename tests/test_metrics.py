"""Names of metrics; those of single classes, whose own names may have slashes."""

from __future__ import annotations

import numpy as np
import pytest

from maskdino.engine.best_checkpoint import _is_of_class
from maskdino.metrics import before_class, flatten, of_classes_together


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("segm/AP", None),
        ("segm/AP50", None),
        ("sem_seg/mIoU", None),
        ("my/AP-data", "my"),
        ("AP-car", ""),
        ("segm/AP-car/van", "segm"),
        ("my-data/segm/AP-car/AP-van", "my-data/segm"),
        ("panoptic_seg/PQ-sky", "panoptic_seg"),
        ("sem_seg/ACC-IoU-", "sem_seg"),
    ],
)
def test_classes_are_told_from_what_is_measured_of_all(name: str, before: str | None) -> None:
    assert before_class(name) == before
    assert of_classes_together({name: 1.0}) == ({name: 1.0} if before is None else {})


def test_a_class_with_a_slash_may_be_what_the_best_weights_are_chosen_by() -> None:
    """Evaluators that found nothing leave the values of classes out; others know all of them."""
    assert _is_of_class("segm/AP-car/van", ["segm/AP", "bbox/AP-car/van"])
    assert not _is_of_class("segm/AP-car/van", ["segm/AP", "segm/AP-bus/coach"])
    assert not _is_of_class("segm/AP-car/van", ["bbox/AP"])
    assert not _is_of_class("segm/AP51", ["segm/AP"])


def test_nested_results_get_whole_names() -> None:
    results = {"val": {"segm": {"AP": np.float32(2), "AP-car": float("nan")}}, "steps": 3}
    flat = flatten(results)
    assert list(flat) == ["val/segm/AP", "val/segm/AP-car", "steps"]
    assert flat["val/segm/AP"] == 2.0
    with pytest.raises(ValueError, match="the metric segm/AP is '2.0', which is no number"):
        flatten({"segm": {"AP": "2.0"}})
    with pytest.raises(ValueError, match="the metric AP is array.*, which is no number"):
        flatten({"AP": np.zeros(3)})
