"""Numbers of fast libraries are those of pycocotools at the size of COCO's validation set, too.

    python -m pytest -m campaign --log-cli-level=INFO tests/evaluation/test_coco_size.py

takes several minutes and 3 GB, and says how long each takes.
"""

from __future__ import annotations

import logging
import math
import time

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from maskdino.evaluation import coco as coco_evaluation
from maskdino.evaluation.coco import average_precision
from maskdino.ops.rle import to_json

logger = logging.getLogger(__name__)

SIZE = (480, 640)
CLASSES, CORNERS = 80, 24


def outline(generator: np.random.Generator, ellipse: np.ndarray) -> list[float]:
    """Polygon around an ellipse (center x, y, half axes x, y), with a rough edge."""
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    radii = (1 + 0.15 * generator.standard_normal(CORNERS))[:, None]
    points = ellipse[:2] + ellipse[2:] * radii * np.stack([np.cos(angles), np.sin(angles)], 1)
    return points.clip(0, [SIZE[1] - 1, SIZE[0] - 1]).round(2).ravel().tolist()


def ellipse_of(generator: np.random.Generator) -> np.ndarray:
    """Somewhere in the image, from small to large."""
    half = np.exp(generator.uniform(math.log(6), math.log(150), 2))
    return np.concatenate([generator.uniform(0, [SIZE[1], SIZE[0]]), half])


def entry_of(generator: np.random.Generator, ellipse: np.ndarray, image: int, label: int) -> dict:
    """What annotations and result records have in common."""
    polygon = outline(generator, ellipse)
    rle = mask_utils.merge(mask_utils.frPyObjects([polygon], *SIZE))
    return {
        "image_id": image,
        "category_id": label,
        "bbox": mask_utils.toBbox(rle).tolist(),
        "segmentation": to_json(rle),
        "area": float(mask_utils.area(rle)),
        "polygon": polygon,
    }


def drawn(images: int, objects: int, found: int, seed: int = 0) -> tuple[dict, list[dict]]:
    """Annotations, one in 80 of a crowd, and result records: four tries at each, then noise."""
    generator = np.random.default_rng(seed)
    annotations, records = [], []
    of_image: list[list[tuple[np.ndarray, int]]] = [[] for _ in range(images)]
    for number in range(objects):
        image, label = (int(x) for x in generator.integers((images, CLASSES)))
        ellipse, crowd = ellipse_of(generator), number % 80 == 0
        entry = entry_of(generator, ellipse, image, label)
        polygon = entry.pop("polygon")
        annotations.append(entry | {"id": number + 1, "iscrowd": int(crowd)})
        if not crowd:
            annotations[-1]["segmentation"] = [polygon]
        of_image[image].append((ellipse, label))
    for image, known in enumerate(of_image):
        for number in range(found):
            if number < 4 * len(known):
                ellipse, label = known[number % len(known)]
                shift = (0.02 + 0.1 * (number // len(known))) * generator.standard_normal(4)
                move, grow = shift[:2] * ellipse[2:], np.exp(shift[2:])
                ellipse = np.concatenate([ellipse[:2] + move, ellipse[2:] * grow])
                score = generator.beta(4, 2 + number // len(known))
            else:
                ellipse, score = ellipse_of(generator), generator.beta(1, 8)
                label = int(generator.integers(CLASSES))
            record = entry_of(generator, ellipse, image, label)
            records.append(record | {"score": float(np.float32(score))})
            del records[-1]["polygon"]
    ground_truth = {
        "images": [
            {"id": i, "height": SIZE[0], "width": SIZE[1], "file_name": f"{i}.png"}
            for i in range(images)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(CLASSES)],
        "annotations": annotations,
    }
    return ground_truth, records


def compare(data: tuple[dict, list[dict]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Asserts that all numbers are equal; returns a line for each library and task."""
    lines = []
    for task in ("bbox", "segm"):
        plain = None
        for name in ("pycocotools", *coco_evaluation.FAST):
            with monkeypatch.context() as patch:
                patch.setattr(coco_evaluation, "FAST", (name,))
                if coco_evaluation.fast_library() is None:
                    continue
                begin, cpu = time.perf_counter(), time.process_time()
                found = average_precision(*data, task, fast=name != "pycocotools")
                times = time.perf_counter() - begin, time.process_time() - cpu
            lines.append(f"{task} {name}: {times[0]:.1f} s, {times[1]:.1f} s of all cores")
            plain = plain or found
            np.testing.assert_allclose(found[0], plain[0], rtol=0, atol=1e-9)
            np.testing.assert_allclose(found[1], plain[1], rtol=0, atol=1e-12)
            assert found[2] == plain[2] and 5 < plain[0][0] < 95
    return lines


def test_some_images(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = compare(drawn(20, 150, 30), monkeypatch)
    assert {line.split(":")[0] for line in lines} >= {"bbox pycocotools", "segm pycocotools"}


@pytest.mark.campaign
def test_5000_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in compare(drawn(5000, 36_781, 100), monkeypatch):
        logger.info(line)
