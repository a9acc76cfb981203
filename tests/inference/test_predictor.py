"""The predictor gives what the model gives, for pictures one by one or together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.model import MaskDINO
from maskdino.postprocess import frame as frame_module
from maskdino.postprocess import instances as instances_module
from maskdino.visualization.images import ImageError
from maskdino.visualization.results import ImageResult
from tests.helpers import CHANNELS, NUM_CLASSES, tiny_cfg

TASKS = ("instance", "panoptic", "semantic")


def make_cfg(**overrides: object) -> CfgNode:
    """A narrow model for all tasks, and small test sizes."""
    # Random masks overlap a lot: a low threshold leaves some segments.
    switches = {"TEST__PANOPTIC_ON": True, "TEST__SEMANTIC_ON": True}
    switches["TEST__PANOPTIC_OVERLAP_THRESHOLD"] = 0.02
    cfg = tiny_cfg(**(switches | overrides))
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    return cfg


@pytest.fixture(scope="module")
def cfg() -> CfgNode:
    return make_cfg()


@pytest.fixture(scope="module")
def model(cfg: CfgNode) -> MaskDINO:
    torch.manual_seed(0)
    model = MaskDINO(cfg)
    # Scores like those of a trained model: some objects, far from all.
    torch.nn.init.normal_(model.heads.class_head.weight, std=0.5)
    torch.nn.init.constant_(model.heads.class_head.bias, -1.0)
    return model.eval()


@pytest.fixture
def predictor(model: MaskDINO, cfg: CfgNode) -> MaskDINOPredictor:
    return MaskDINOPredictor.from_model(model, cfg, confidence_threshold=0.3)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random colours in blocks of 8 pixels."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


def assert_equal(first: ImageResult, second: ImageResult) -> None:
    """Equal to rounding; a pixel at a border may differ."""
    assert first.tasks == second.tasks
    assert first.size == second.size
    np.testing.assert_allclose(first.boxes, second.boxes, atol=1e-2)
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-4)
    np.testing.assert_array_equal(first.class_ids, second.class_ids)
    for name in ("masks", "panoptic_ids", "label_map"):
        if getattr(first, name) is not None:
            different = getattr(first, name) != getattr(second, name)
            assert different.sum() <= 1e-3 * different.size  # also where there is no object


def test_equals_the_model(predictor: MaskDINOPredictor, model: MaskDINO) -> None:
    image = picture(64, 80)
    result = predictor(image)
    inputs = {"image": torch.from_numpy(image).permute(2, 0, 1), "height": 64, "width": 80}
    (expected,) = model([inputs])
    objects = expected["instances"]
    objects = objects[objects.scores >= 0.3]
    objects = objects[objects.scores.argsort(descending=True, stable=True)]
    assert 0 < len(objects) == len(result)
    objects.pred_boxes.clip((64, 80))
    np.testing.assert_allclose(result.boxes, objects.pred_boxes.tensor, atol=1e-4)
    np.testing.assert_allclose(result.scores, objects.scores, atol=1e-6)
    np.testing.assert_array_equal(result.class_ids, objects.pred_classes)
    np.testing.assert_array_equal(result.masks, objects.pred_masks)
    ids, segments = expected["panoptic_seg"]
    np.testing.assert_array_equal(result.panoptic_ids, ids)
    assert list(result.segments) == segments
    assert segments
    np.testing.assert_array_equal(result.label_map, expected["sem_seg"].argmax(0))


def test_few_masks_at_a_time_change_nothing(
    predictor: MaskDINOPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(64, 80)
    whole = predictor(image)
    monkeypatch.setattr(frame_module, "ELEMENTS_AT_ONCE", 3 * 64 * 80)
    for limit in (1, 4 * 64 * 80 // 8):  # after each three masks, after each six
        monkeypatch.setattr(instances_module, "MASK_BYTES_AT_ONCE", limit)
        assert_equal(whole, predictor(image))


def test_queries_of_several_classes_share_a_mask(model: MaskDINO, cfg: CfgNode) -> None:
    result = MaskDINOPredictor.from_model(model, cfg, confidence_threshold=0.0)(picture(64, 80))
    assert len({rle["counts"] for rle in result.rles}) < len(result)
    assert len({id(rle) for rle in result.rles}) == len(result)


def test_boxes_that_are_not_finite_are_no_result() -> None:
    # Boxes of the queries before the first layer: none has entered the content yet.
    cfg = make_cfg(TEST__DECODER_LAYER=0, QUERY_SELECTION__MASK_ENHANCED_ANCHORS="none")
    model = MaskDINO(cfg)
    torch.nn.init.constant_(model.heads.box_head.layers[-1].bias, float("nan"))
    predictor = MaskDINOPredictor.from_model(model, cfg, confidence_threshold=0.0)
    with pytest.raises(FloatingPointError, match="boxes that are not finite"):
        predictor(picture(64, 64))


def test_batches_equal_single_pictures(model: MaskDINO, cfg: CfgNode) -> None:
    sizes = [(64, 64), (64, 96), (40, 40), (30, 45), (64, 64), (96, 64), (1, 1)]
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    single = MaskDINOPredictor.from_model(model, cfg, confidence_threshold=0.3)
    batched = MaskDINOPredictor.from_model(model, cfg, confidence_threshold=0.3, batch_size=3)
    results = batched(images)
    assert [result.size for result in results] == sizes
    for image, result in zip(images, results, strict=True):
        assert_equal(single(image), result)


def test_maps_of_huge_pictures_are_enlarged(
    predictor: MaskDINOPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(128, 160)
    exact = predictor(image)
    monkeypatch.setattr(frame_module, "MAP_VALUES_AT_ONCE", 1)
    rough = predictor(image)
    assert rough.label_map.shape == rough.panoptic_ids.shape == (128, 160)
    assert (rough.label_map == exact.label_map).mean() > 0.9
    np.testing.assert_array_equal(rough.boxes, exact.boxes)


def test_one_or_many_and_their_names(predictor: MaskDINOPredictor, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture(64, 64)).save(path)
    result = predictor(path)
    assert result.name == str(path)
    many = predictor([path, picture(64, 64), torch.zeros(3, 64, 64, dtype=torch.uint8)])
    assert [r.name for r in many] == [str(path), "image 1", "image 2"]
    assert_equal(result, many[0])
    assert len(predictor(np.zeros((2, 64, 64, 3), np.uint8))) == 2
    assert predictor([]) == []
    np.testing.assert_array_equal(result.image, picture(64, 64))
    with pytest.raises(ImageError, match=r"missing\.png"):
        predictor([path, tmp_path / "missing.png"])
    with pytest.raises(TypeError, match="an image is a path, an array, .*, not NoneType"):
        predictor(None)  # OpenCV's answer for a file that is missing


def test_conversions(predictor: MaskDINOPredictor, tmp_path: Path) -> None:
    result = predictor(picture(64, 80))
    instances = result.to_instances()
    assert instances.image_size == (64, 80)
    assert instances.pred_masks.shape == (len(result), 64, 80)
    entries = result.to_coco(image_id=7)
    assert len(entries) == len(result)
    x, y, width, height = entries[0]["bbox"]
    np.testing.assert_allclose([x, y, x + width, y + height], result.boxes[0], rtol=1e-5)
    assert entries[0]["image_id"] == 7
    assert result.class_names[0] == entries[0]["category_name"] == f"class {result.class_ids[0]}"
    saved = json.loads(result.save(tmp_path / "sub" / "all.json").read_text())
    assert [len(saved[task]) for task in TASKS[:2]] == [len(result), len(result.segments)]
    assert saved["semantic"]
    few = result.select(result.scores > result.scores[0] - 1e-6)
    assert 1 <= len(few) == len(few.rles) < len(result)


def test_drawing_marks_what_was_found(predictor: MaskDINOPredictor, tmp_path: Path) -> None:
    result = predictor(picture(64, 80))
    for task in TASKS:
        drawn = result.draw(task, scale=2)
        assert drawn.shape == (128, 160, 3)
        assert (drawn != result.image.repeat(2, axis=0).repeat(2, axis=1)).any()
    path = result.save(tmp_path / "drawn.png", task="instance")
    np.testing.assert_array_equal(np.array(Image.open(path)), result.draw("instance"))
    empty = result.select(np.zeros(len(result), bool))
    np.testing.assert_array_equal(empty.draw("instance"), result.image)
    with pytest.raises(ValueError, match="holds"):
        empty.draw("depth")


def test_threshold_of_one_leaves_nothing(model: MaskDINO, cfg: CfgNode) -> None:
    result = MaskDINOPredictor.from_model(model, cfg, confidence_threshold=1.0)(picture(64, 64))
    assert len(result) == len(result.rles) == 0
    assert result.masks.shape == (0, 64, 64)
    assert result.to_coco() == []
    assert result.to_instances().pred_boxes.tensor.shape == (0, 4)


def test_boxes_alone() -> None:
    cfg = make_cfg(MASK_ON=False, TEST__PANOPTIC_ON=False, TEST__SEMANTIC_ON=False)
    predictor = MaskDINOPredictor.from_model(MaskDINO(cfg), cfg, confidence_threshold=0.0)
    result = predictor(picture(64, 64))
    assert len(result) == 20
    assert result.rles is None
    assert "segmentation" not in result.to_coco()[0]
    assert (result.draw() != result.image).any()
    with pytest.raises(ValueError, match="boxes only"):
        MaskDINOPredictor.from_model(MaskDINO(cfg), cfg, tasks=("panoptic",))


def test_from_config_loads_the_checkpoint(
    model: MaskDINO, cfg: CfgNode, predictor: MaskDINOPredictor, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    arguments = (tmp_path / "config.yaml", tmp_path / "weights.pth")
    loaded = MaskDINOPredictor.from_config(*arguments, confidence_threshold=0.3)
    assert_equal(predictor(picture(64, 64)), loaded(picture(64, 64)))
    few = MaskDINOPredictor.from_config(
        *arguments, confidence_threshold=0.0, tasks=["instance"], max_detections=3, size=32
    )(picture(64, 64))
    assert few.tasks == ("instance",)
    assert len(few) == 3
    other = ["MODEL.MASK_DINO.NUM_CLASSES", str(NUM_CLASSES + 1)]
    with pytest.raises(ValueError, match="does not fit"):
        MaskDINOPredictor.from_config(*arguments, opts=other)


def test_classes_of_a_dataset_by_its_name(model: MaskDINO, cfg: CfgNode, tmp_path: Path) -> None:
    """Names that only its annotations tell, in the predictor's own way; nobody assigns them."""
    names = ["a", "b", "c", "d", "e"]
    metadata = MetadataCatalog.get("predictor_test_dataset")
    DatasetCatalog.register(
        "predictor_test_dataset", lambda: metadata.set(thing_classes=names) and []
    )
    try:
        (tmp_path / "config.yaml").write_text(cfg.dump())
        torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
        predictor = MaskDINOPredictor.from_config(
            tmp_path / "config.yaml", tmp_path / "weights.pth", dataset="predictor_test_dataset"
        )
    finally:
        DatasetCatalog.remove("predictor_test_dataset")
        MetadataCatalog.remove("predictor_test_dataset")
    assert list(predictor.categories.names) == names
    few = predictor.with_options(tasks=("instance",), confidence_threshold=0.3)
    assert predictor.options.tasks == TASKS
    result = few(picture(64, 80))
    assert result.tasks == ("instance",)
    assert result.class_names == [names[label] for label in result.class_ids]
    with pytest.raises(ValueError, match="there is no dataset 'nowhere'"):
        MaskDINOPredictor.from_model(model, cfg, dataset="nowhere")


def test_features_of_objects(model: MaskDINO, cfg: CfgNode) -> None:
    """What the decoder knows of an object: its class head makes the object's class of it."""
    asked = {"confidence_threshold": 0.3, "tasks": ("instance",)}
    plain = MaskDINOPredictor.from_model(model, cfg, **asked)(picture(64, 80))
    result = MaskDINOPredictor.from_model(model, cfg, **asked, features=True)(picture(64, 80))
    assert plain.features is None
    assert_equal(plain, result)
    assert result.features.shape == (len(result), CHANNELS) and result.features.dtype == np.float32
    with torch.no_grad():
        logits, _ = model.heads.classes_and_masks(torch.from_numpy(result.features))
    scores = logits.sigmoid()[torch.arange(len(result)), torch.from_numpy(result.class_ids)]
    assert len(result) > 1 and (scores >= torch.from_numpy(result.scores) - 1e-5).all()
    few = result.select(np.array([1]))
    np.testing.assert_array_equal(few.features, result.features[1:2])


def test_wrong_arguments_are_named(cfg: CfgNode, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    build = MaskDINOPredictor.from_config
    with pytest.raises(FileNotFoundError, match="nuclei/instance/maskdino_tiny"):
        build("nuclei/instance/maskdino_tin")
    with pytest.raises(ValueError, match=r"names no MODEL\.WEIGHTS"):
        build(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        build(path, tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match=r"DETECTIONS_PER_IMAGE is -3; it must be at least 1"):
        build(path, tmp_path / "nowhere.pth", max_detections=-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"confidence_threshold": 1.5},
        {"tasks": ("depth",)},
        {"tasks": ()},
        {"batch_size": 0},
    ],
)
def test_options_out_of_range(model: MaskDINO, cfg: CfgNode, wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"1\.5|depth|tasks are|batch size is 0"):
        MaskDINOPredictor.from_model(model, cfg, **wrong)


def test_a_task_may_be_named_by_a_text(model: MaskDINO, cfg: CfgNode) -> None:
    predictor = MaskDINOPredictor.from_model(model, cfg, tasks="instance")
    assert predictor.options.tasks == ("instance",)
    with pytest.raises(ValueError, match="tasks are 'instance'; they must be a list of"):
        predictor.with_options(tasks="instance")
