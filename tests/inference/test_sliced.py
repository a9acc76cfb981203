"""Large images in slices: no object is torn, doubled or lost, and memory stays small."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from scipy.ndimage import find_objects

from maskdino.categories import Categories
from maskdino.inference import sliced
from maskdino.inference.parts import Window, slices_of
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.inference.sliced import predict_sliced
from maskdino.inference.tiles import TiledImage
from maskdino.model import MaskDINO
from maskdino.ops.rle import decode_segmentation, encode_mask
from maskdino.visualization.images import ImageError
from maskdino.visualization.results import ImageResult
from tests.helpers import tiny_cfg

NUCLEI = Path(__file__).resolve().parents[2] / "datasets" / "nuclei"
CATEGORIES = Categories(("blob", "bar", "ground"), (True, True, False), (1, 2, 3))
ROUGH = 2  # pixels at the edge of a slice where the oracle's masks are wrong


class Oracle:
    """Sees objects painted in colors: (object's number, class, anything); 0 is background.

    Like a model it knows nothing of what lies outside of the image it is given.
    """

    def __init__(self, *, tasks: tuple[str, ...] = ("instance",), rough: bool = False) -> None:
        self.tasks, self.rough, self.asked = tasks, rough, list[tuple[int, ...]]()

    def __call__(self, images: Iterable[np.ndarray]) -> Iterator[ImageResult]:
        for image in images:
            self.asked.append(image.shape)
            yield self.see(image)

    def see(self, image: np.ndarray) -> ImageResult:
        numbers = image[..., 0] + image[..., 2].astype(int) * 256
        found = []
        for n, place in enumerate(find_objects(numbers), start=1):
            if place is not None:
                mask = np.zeros(numbers.shape, bool)
                mask[place] = numbers[place] == n
                found.append((mask, int(image[mask][0, 1])))
        if self.rough:
            for mask, _ in found:
                inner = mask[ROUGH:-ROUGH, ROUGH:-ROUGH].copy()
                mask[:] = False
                mask[ROUGH:-ROUGH, ROUGH:-ROUGH] = inner
            found = [(mask, label) for mask, label in found if mask.any()]
        rles = tuple(encode_mask(mask) for mask, _ in found)
        boxes = np.array([mask_utils.toBbox(rle) for rle in rles], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        # Larger parts are seen more surely.
        scores = np.array([0.9 - 0.5 / mask.sum() for mask, _ in found], np.float32)
        parts: dict = {}
        if "instance" in self.tasks:
            labels = np.array([label for _, label in found], np.int64)
            parts = {"boxes": boxes, "scores": scores, "class_ids": labels, "rles": rles}
        if "panoptic" in self.tasks:
            ids, segments = np.ones(image.shape[:2], np.int32), []
            for number, (mask, label) in enumerate(found, start=2):
                ids[mask] = number
                thing = {"category_id": label, "isthing": True, "score": float(scores[number - 2])}
                segments.append({"id": number, **thing})
            segments.append({"id": 1, "category_id": 2, "isthing": False})
            parts |= {"panoptic_ids": ids, "segments": tuple(segments)}
        if "semantic" in self.tasks:
            parts["label_map"] = np.where(numbers > 0, image[..., 1], 2).astype(np.uint8)
        return ImageResult("slice", image.shape[:2], CATEGORIES, source=image, **parts)


def paint(image: np.ndarray, number: int, mask: np.ndarray | tuple, label: int = 0) -> None:
    image[mask] = (number % 256, label, number // 256)


@cache
def drawn_scene() -> np.ndarray:
    """(300, 420, 3): blobs everywhere, a bar through all columns, and a ring over all slices."""
    image = np.zeros((300, 420, 3), np.uint8)
    y, x = np.mgrid[:300, :420]
    paint(image, 1, (slice(140, 152), slice(0, 420)), label=1)
    radius = np.hypot(y - 150, x - 210)
    paint(image, 2, (radius > 100) & (radius < 112) & (np.abs(y - 146) > 8))
    number = 2
    for top in range(4, 290, 26):
        for left in range(3, 410, 23):
            blob = np.hypot(y - top - 6, x - left - 6) < 7
            near = np.hypot(y - top - 6, x - left - 6) < 9
            if not image[near].any():
                number += 1
                paint(image, number, blob, label=number % 2)
    assert number > 60
    image.setflags(write=False)
    return image


def run(oracle: Oracle, image: np.ndarray, size: int = 100, overlap: float = 0.2) -> ImageResult:
    return predict_sliced(
        oracle, TiledImage(image), size=size, overlap=overlap, name="scene", progress=False
    )


def counts(result: ImageResult) -> list[tuple]:
    return sorted((int(k), rle["counts"]) for k, rle in zip(result.class_ids, result.rles))  # noqa: B905


@pytest.mark.parametrize(
    ("size", "overlap"), [(100, 0.2), (64, 0.3), (131, 0.15), (200, 0.5), (90, 0.7), (350, 0.1)]
)
def test_no_object_is_torn_or_doubled(size: int, overlap: float) -> None:
    image, oracle = drawn_scene(), Oracle()
    result = run(oracle, image, size, overlap)
    assert len(oracle.asked) > 1
    assert counts(result) == counts(oracle.see(image))
    assert result.size == (300, 420) and result.name == "scene"
    assert (np.diff(result.scores) <= 0).all()
    for box, rle in zip(result.boxes, result.rles, strict=True):
        x0, y0, width, height = mask_utils.toBbox(rle)
        np.testing.assert_array_equal(box, [x0, y0, x0 + width, y0 + height])


def test_a_mosaic_of_real_masks_is_that_of_the_single_images() -> None:
    """Nuclei of 12 images side by side; those that touch at the seams of images stay apart."""
    data = json.loads((NUCLEI / "annotations" / "instances_val.json").read_text())
    mosaic, number = np.zeros((4 * 256, 3 * 320, 3), np.uint8), 0
    for i, entry in enumerate(data["images"][::2]):
        top, left = i // 3 * 256, i % 3 * 320
        window = mosaic[top : top + entry["height"], left : left + entry["width"]]
        for annotation in data["annotations"]:
            if annotation["image_id"] == entry["id"]:
                number += 1
                size = entry["height"], entry["width"]
                mask = decode_segmentation(annotation["segmentation"], size)
                paint(window, number, mask)
    assert number > 200
    assert counts(run(Oracle(), mosaic, 256, 0.25)) == counts(Oracle().see(mosaic))
    # Masks that are wrong at the edges of slices are wrong at the edge of the image alone.
    expected, result = Oracle(rough=True).see(mosaic), run(Oracle(rough=True), mosaic, 256, 0.25)
    assert counts(result) == counts(expected)


def test_slices_cover_the_image_and_each_pixel_has_one_owner() -> None:
    for size, edge, overlap in (((300, 420), 100, 0.2), ((99, 1000), 100, 0.9), ((7, 9), 8, 0.0)):
        slices = slices_of(size, edge, overlap)
        owners = np.zeros(size, int)
        for own in slices:
            assert own.owned.common(own) == own.owned
            assert own.shape == (min(edge, size[0]), min(edge, size[1]))
            owners[own.owned.inside(Window(0, 0, *size))] += 1
        assert (owners == 1).all()
        pairs = [(a, b) for a, b in zip(slices, slices[1:], strict=False) if a.top == b.top]
        assert all(a.right - b.left >= overlap * min(edge, size[1]) for a, b in pairs)


def test_what_one_slice_alone_sees_at_its_edge_is_left_out() -> None:
    """The next slice sees all of it, and nothing there."""
    image = drawn_scene() * 0
    paint(image, 1, (slice(20, 40), slice(20, 40)))

    class Guessing(Oracle):
        def see(self, image: np.ndarray) -> ImageResult:
            if len(self.asked) == 1:
                paint(image := image.copy(), 2, (slice(50, 60), slice(95, 100)))
            return super().see(image)

    assert len(run(Guessing(), image)) == 1


def test_objects_of_two_classes_and_touching_ones_stay_apart() -> None:
    image = np.zeros((100, 300, 3), np.uint8)
    paint(image, 1, (slice(40, 50), slice(0, 300)), label=0)
    paint(image, 2, (slice(50, 60), slice(0, 300)), label=0)
    paint(image, 3, (slice(60, 70), slice(0, 300)), label=1)
    result = run(Oracle(), image)
    assert counts(result) == counts(Oracle().see(image))
    assert len(result) == 3


def test_scores_of_joined_objects_lie_between_those_of_their_parts() -> None:
    image = np.zeros((100, 300, 3), np.uint8)
    paint(image, 1, (slice(40, 50), slice(0, 300)))
    scores: list[float] = []

    class Unequal(Oracle):
        def see(self, image: np.ndarray) -> ImageResult:
            result = super().see(image)
            result.scores[:] = 0.9 - 0.1 * len(scores)
            scores.append(float(result.scores[0]))
            return result

    (score,) = run(Unequal(), image).scores
    assert min(scores) < score < max(scores)


def test_panoptic_and_semantic_maps_are_those_of_the_whole_image() -> None:
    image = drawn_scene()
    oracle = Oracle(tasks=("instance", "panoptic", "semantic"), rough=False)
    expected, result = oracle.see(image), run(oracle, image)
    assert result.tasks == ("instance", "panoptic", "semantic")
    np.testing.assert_array_equal(result.label_map, expected.label_map)
    assert result.label_map.dtype == np.uint8 and result.panoptic_ids.dtype == np.int32
    pairs = np.unique(np.stack([result.panoptic_ids, expected.panoptic_ids]).reshape(2, -1), axis=1)
    # One to one, of one class.
    assert len(pairs[0]) == len(set(pairs[0])) == len(set(pairs[1])) == len(expected.segments)
    labels, expected_labels = (
        {s["id"]: (s["category_id"], s["isthing"]) for s in r.segments} for r in (result, expected)
    )
    assert [labels[i] for i in pairs[0]] == [expected_labels[i] for i in pairs[1]]


def test_boxes_alone_are_joined() -> None:
    class Boxes(Oracle):
        def see(self, image: np.ndarray) -> ImageResult:
            return ImageResult(**{**vars(super().see(image)), "rles": None})

    image = np.zeros((100, 300, 3), np.uint8)
    paint(image, 1, (slice(40, 50), slice(10, 290)))
    paint(image, 2, (slice(70, 80), slice(85, 97)))
    result = run(Boxes(), image)
    assert result.rles is None
    found = sorted(result.boxes.tolist())
    assert found == [[10, 40, 290, 50], [85, 70, 97, 80]]


def test_a_slice_that_is_larger_than_the_image_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sliced._say_that_it_fits.cache_clear()
    image, oracle = drawn_scene(), Oracle()
    with caplog.at_level(logging.WARNING):
        result = run(oracle, image, 500)
        run(oracle, image, 500)
    assert counts(result) == counts(oracle.see(image))
    assert result.name == "scene"
    assert [r.message for r in caplog.records] == [
        "images that fit into one slice of 500 pixels are predicted as they are"
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "slices of 0 pixels are too small: at least 48"),
        ({"size": -100}, "slices of -100 pixels are too small: at least 48"),
        ({"size": 100.5}, "slices of 100.5 pixels: their edge must be one whole number"),
        (
            {"size": (512, 512)},
            r"slices of \(512, 512\) pixels: their edge must be one whole number",
        ),
        (
            {"overlap": 1.0},
            r"overlap by 1.0: it must be in \[0, 0.9\], as a share of their 100 pixels",
        ),
        ({"overlap": 100}, r"slices that overlap by 100: it must be in \[0, 0.9\]"),
        ({"overlap": -0.1}, "slices that overlap by -0.1"),
        ({"overlap": float("nan")}, "slices that overlap by nan"),
    ],
)
def test_sizes_out_of_range(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Oracle(), drawn_scene(), **wrong)


def test_the_predictor_slices(tmp_path: Path) -> None:
    """Through the network: batches, files, and the plain prediction of what is small."""
    cfg = tiny_cfg(TEST__PANOPTIC_ON=True, TEST__SEMANTIC_ON=True)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    predictor = MaskDINOPredictor.from_model(
        MaskDINO(cfg), cfg, confidence_threshold=0.0, batch_size=3, features=True
    )
    image = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    result = predictor.sliced(path, size=64)
    assert result.size == (100, 150) and result.name == str(path)
    assert result.tasks == ("instance", "panoptic", "semantic")
    assert len(result) and len(result.features) == len(result.rles) == len(result)
    assert {tuple(rle["size"]) for rle in result.rles} == {(100, 150)}
    assert result.draw("instance").shape == (100, 150, 3)
    for image_again in (path, image):  # as they come from another process
        sent = predictor.sliced(image_again, size=64)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(sent)).draw(), sent.draw())
    assert result.class_scores is None
    scoring = predictor.with_options(class_scores=True, tasks=("semantic",))
    scored = scoring.sliced(path, size=64)
    assert scored.class_scores.shape == (len(predictor.is_thing), 100, 150)
    assert scored.scaled_down(75).class_scores.shape[1:] == scored.scaled_down(75).size == (50, 75)
    assert scoring.sliced(path, size=150).class_scores.shape == scored.class_scores.shape
    whole, plain = predictor.sliced(image, size=150), predictor(image)
    np.testing.assert_array_equal(whole.boxes, plain.boxes)
    with pytest.raises(ImageError, match=r"missing\.png does not exist"):
        predictor.sliced(tmp_path / "missing.png")


def test_slices_of_the_configuration_are_those_of_the_predictor(tmp_path: Path) -> None:
    """A model that is judged in slices predicts in slices."""
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    model = MaskDINO(cfg)
    whole = MaskDINOPredictor.from_model(model, cfg, confidence_threshold=0.0)
    cfg.TEST.SLICES.SIZE, cfg.TEST.SLICES.OVERLAP = 64, 0.4
    predictor = MaskDINOPredictor.from_model(model, cfg, confidence_threshold=0.0)
    image = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    expected = whole.sliced(image, 64, 0.4)
    first, second = predictor([image, path])
    assert (first.name, second.name) == ("image 0", str(path))
    for result in (first, second, predictor.sliced(image)):
        np.testing.assert_array_equal(result.boxes, expected.boxes)
    assert len(whole(image)) < len(expected) == len(first)
    np.testing.assert_array_equal(
        predictor.with_options(slices=None)(image).boxes, whole(image).boxes
    )


def test_an_image_that_takes_long_has_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not each of many small images."""
    scene = TiledImage(drawn_scene())
    for patience, expected in ((60, False), (0, True)):
        monkeypatch.setattr(sliced, "PATIENCE", patience)
        predict_sliced(Oracle(), scene, size=60, overlap=0.2, name="scene", progress=True)
        assert ("slice/s" in capsys.readouterr().err) == expected
