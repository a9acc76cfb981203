"""Packages of others on our models and results, where they are installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskdino import MaskDINOPredictor
from maskdino.config import load_config
from maskdino.model import MaskDINO
from maskdino.visualization.results import ImageResult

REPOSITORY = Path(__file__).parents[2]
NUCLEI_TINY = REPOSITORY / "configs/nuclei/instance/maskdino_tiny.yaml"
IMAGE = REPOSITORY / "datasets/nuclei/val/4ae4f936a9ade472.png"  # a colored one


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A model with random weights whose hundred scores are about 0.3."""
    torch.manual_seed(0)
    model = MaskDINO(load_config(NUCLEI_TINY, ["MODEL.DEVICE", "cpu"]))
    torch.nn.init.normal_(model.heads.class_head.weight, std=0.1)
    torch.nn.init.zeros_(model.heads.class_head.bias)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


def scores_and_boxes(result: ImageResult, x: int = 0, y: int = 0) -> list[tuple]:
    """Score, and x0, y0, x1, y1 of each object, moved by x and y, as SAHI keeps them.

    It takes boxes from polygons of the masks, which leave out parts of one or two pixels.
    """
    from sahi.utils.cv import get_coco_segmentation_from_bool_mask

    found = []
    for mask, score in zip(result.masks, result.scores, strict=True):
        polygons = get_coco_segmentation_from_bool_mask(mask)
        if polygons:
            corners = np.concatenate(polygons).reshape(-1, 2) + (x, y)
            found.append((round(float(score), 5), *corners.min(0), *corners.max(0)))
    return sorted(found)


def test_sahi_predicts_with_our_models_whole_images_and_slices(weights: str) -> None:
    pytest.importorskip("sahi", reason="sahi is not installed")
    from sahi import AutoDetectionModel
    from sahi.predict import get_prediction, get_sliced_prediction
    from sahi.prediction import PredictionResult
    from sahi.slicing import get_slice_bboxes

    common = {"device": "cpu", "confidence_threshold": 0.28}
    ours = MaskDINOPredictor.from_config(NUCLEI_TINY, weights, **common)
    theirs = AutoDetectionModel.from_pretrained(
        "detectron2", model_path=weights, config_path=str(NUCLEI_TINY), **common
    )
    assert theirs.category_mapping == {"0": "nucleus"}

    def found(result: PredictionResult) -> list[tuple]:
        objects = result.object_prediction_list
        return sorted((round(o.score.value, 5), *map(int, o.bbox.to_xyxy())) for o in objects)

    pixels = np.asarray(Image.open(IMAGE).convert("RGB"))
    # To a model that reads RGB, SAHI hands RGB to detectron2, which takes it for BGR.
    bgr = pixels[:, :, ::-1].copy()
    expected = scores_and_boxes(ours(IMAGE))
    assert len(expected) > 5
    assert found(get_prediction(bgr, theirs)) == expected

    # What all slices show: no two objects overlap so much that one of them is left out.
    slices = get_slice_bboxes(*pixels.shape[:2], 160, 160, False, 0.2, 0.2)
    expected = []
    for x0, y0, x1, y1 in slices:
        expected += scores_and_boxes(ours(pixels[y0:y1, x0:x1]), x0, y0)
    assert len(slices) == 6 and len(expected) > 20
    result = get_sliced_prediction(
        bgr,
        theirs,
        slice_height=160,
        slice_width=160,
        perform_standard_pred=False,
        postprocess_type="NMS",
        postprocess_match_threshold=1.1,
        verbose=0,
    )
    assert found(result) == sorted(expected)


def test_supervision_takes_our_objects_and_trackers_follow_them(weights: str) -> None:
    sv = pytest.importorskip("supervision", reason="supervision is not installed")
    predictor = MaskDINOPredictor.from_config(
        NUCLEI_TINY, weights, device="cpu", confidence_threshold=0.28
    )
    result = predictor(IMAGE)
    found = result.to_supervision()
    assert isinstance(found, sv.Detections) and len(found) == len(result) > 5
    np.testing.assert_array_equal(found.mask, result.masks)
    np.testing.assert_array_equal(found.xyxy, result.boxes)
    assert set(found["class_name"]) == {"nucleus"}
    assert len(found[found.confidence > 0.3]) == (result.scores > 0.3).sum()
    assert 0 < len(found.with_nms(0.1)) < len(found)
    assert sv.MaskAnnotator().annotate(result.image.copy(), found).shape == result.image.shape
    assert len(result.select(result.scores > 2).to_supervision()) == 0

    trackers = pytest.importorskip("trackers", reason="trackers is not installed")
    tracker = trackers.ByteTrackTracker(minimum_consecutive_frames=1)
    for _ in range(3):
        tracked = tracker.update(found)
    assert len(tracked) > 0
