"""Random annotations: whatever a file holds, training can read it or one line says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils

from maskdino.config import load_config
from maskdino.custom.annotations import read_annotations, write_annotations
from maskdino.custom.checks import check, drop
from maskdino.data import register_coco_folder
from maskdino.data.annotation_checks import geometry_problem
from maskdino.data.checks import check_datasets
from maskdino.data.mappers import InstanceMapper
from maskdino.data.masks import CroppedMask, draw_polygons, pack
from maskdino.system.errors import UserError
from tests.corpus.scene import NAME, content, write_images
from tests.random_inputs import depths, masks, numbers, values

KEYS = (
    ("images", ("id", "file_name", "height", "width")),
    ("annotations", ("id", "image_id", "category_id", "iscrowd", "area", "bbox", "segmentation")),
    ("annotations", ("keypoints", "ignore", "mine")),
    ("categories", ("id", "name", "supercategory")),
)


@st.composite
def spoilt(draw: st.DrawFn) -> Any:
    """The content of an annotation file, of which some values are any others."""
    data = content()
    for _ in range(draw(st.integers(1, 3))):
        kind, keys = draw(st.sampled_from(KEYS))
        entry = draw(st.sampled_from(data[kind]))
        key = draw(st.sampled_from(keys))
        shape = draw(st.sampled_from(["value", "box", "polygon", "runs", "gone"]))
        if shape == "gone":
            entry.pop(key, None)
        elif shape == "box":
            entry["bbox"] = draw(st.lists(numbers, min_size=4, max_size=4))
        elif shape == "polygon":
            entry["segmentation"] = [draw(st.lists(numbers, min_size=6, max_size=8))]
        elif shape == "runs":
            counts = draw(st.lists(st.integers(-1, 3072), max_size=4) | st.text(max_size=8))
            entry["segmentation"] = {"size": [48, 64], "counts": counts}
        else:
            entry[key] = draw(values)
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the images."""
    path = tmp_path_factory.mktemp("random")
    write_images(path)
    return path


def _train_on(json_file: Path, cfg: CfgNode) -> None:
    """Checks and reads all that a training would."""
    register_coco_folder(NAME, json_file, json_file.parent / "images")
    try:
        check_datasets(cfg)
        mapper = InstanceMapper(augmentations=[], image_format="RGB", num_classes=2, use_masks=True)
        for record in DatasetCatalog.get(NAME):
            boxes = mapper(record)["instances"].gt_boxes.tensor
            assert boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


@depths
def test_training_reads_them_or_one_line_says_why_not(depth: settings, folder: Path) -> None:
    cfg = load_config(None, ["DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", "()"])
    cfg.MODEL.MASK_DINO.NUM_CLASSES = 2
    path = folder / "bad.json"

    @depth
    @given(spoilt() | values)
    def holds(data: Any) -> None:
        path.write_text(json.dumps(data))
        try:
            _train_on(path, cfg)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) > 20

    holds()


@depths
def test_own_data_are_mended_or_one_message_says_why_not(depth: settings, folder: Path) -> None:
    cfg = load_config(None, ["DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", "()"])
    cfg.MODEL.MASK_DINO.NUM_CLASSES = 2
    path, mended = folder / "own.json", folder / "mended.json"

    @depth
    @given(spoilt())
    def holds(data: Any) -> None:
        path.write_text(json.dumps(data))
        try:
            own = read_annotations(path, folder / "images")
        except UserError:
            return
        fatal = [finding for finding in check(own) if finding.fatal]
        if not all(finding.droppable for finding in fatal):
            return
        left = drop(own, fatal)
        if left.images and left.objects():
            assert not [finding for finding in check(left) if finding.fatal]
            write_annotations(left, mended)
            _train_on(mended, cfg)

    holds()


@depths
def test_boxes_that_pass_have_pixels_in_the_image(depth: settings) -> None:
    side = st.integers(-100, 100) | st.floats(-100, 100) | numbers

    @depth
    @given(st.lists(side, min_size=3, max_size=5))
    def holds(box: list) -> None:
        problem = geometry_problem({"bbox": box}, (48, 64))
        # Beyond 1e300 nothing can be computed with.
        if len(box) != 4 or not all(abs(x) < 1e300 for x in box):
            assert problem is not None
            return
        x, y, width, height = box
        inside = min(x + width, 64) > max(x, 0) and min(y + height, 48) > max(y, 0)
        assert (problem is None) == (inside and width > 0 and height > 0)

    holds()


@depths
def test_polygons_on_their_crop_are_those_on_the_image(depth: settings) -> None:
    quarter = st.integers(-100, 400).map(lambda x: x / 4)
    polygon = st.lists(st.tuples(quarter, quarter), min_size=3, max_size=7)

    @depth
    @given(st.lists(polygon, min_size=1, max_size=3))
    def holds(polygons: list) -> None:
        size = (40, 50)
        arrays = [np.array(points, float) for points in polygons]
        drawn = draw_polygons(arrays, size)
        flat = [points.ravel().tolist() for points in arrays]
        whole = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(flat, *size)))
        assert ((np.zeros(size) if drawn is None else drawn.whole(size)) == whole).all()

    holds()


@depths
def test_rectangles_are_filled(depth: settings) -> None:
    corner = st.integers(-20, 60)

    @depth
    @given(corner, corner, st.integers(1, 40), st.integers(1, 40))
    def holds(x: int, y: int, width: int, height: int) -> None:
        size = (40, 50)
        x0, y0, x1, y1 = x, y, x + width, y + height
        drawn = draw_polygons([np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)], size)
        expected = np.zeros(size, bool)
        expected[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
        found = np.zeros(size, bool) if drawn is None else drawn.whole(size).astype(bool)
        assert (found == expected).all()

    holds()


@depths
def test_cropped_masks_are_packed_where_they_belong(depth: settings) -> None:
    @depth
    @given(masks(), st.integers(0, 9), st.integers(0, 3))
    def holds(mask: np.ndarray, top: int, eighth: int) -> None:
        size = (top + mask.shape[0] + 2, 8 * eighth + mask.shape[1] + 3)
        cropped = CroppedMask(mask, top, 8 * eighth)
        expected = np.zeros(size, bool)
        for (row, column), value in np.ndenumerate(mask):
            expected[top + row, 8 * eighth + column] = value
        assert (pack([cropped, None], size).to_bool().numpy() == [expected, expected & False]).all()
        assert (cropped.whole(size) == expected).all()
        rows, columns = np.nonzero(expected)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else None
        assert cropped.box() == box

    holds()
