"""All tasks from files to metrics: each learns, bad files are named, boxes and masks mix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from PIL import Image

from maskdino.cli.prepare import coco_semantic, instances_from_panoptic
from maskdino.config import load_config
from maskdino.data.datasets import (
    register_coco_folder,
    register_panoptic_folder,
    register_semantic_folder,
)
from maskdino.data.reading import DataError
from maskdino.engine.trainer import MaskDINOTrainer
from tests.data.synthetic import COCO_IDS, Scene, box_xywh, make_scenes, write_coco

NAMES = ["person", "car", "road", "sky"]
THINGS = ("person", "car")
NARROW = {
    "MODEL.DEVICE": "cpu",
    "MODEL.MASK_DINO.NUM_CLASSES": 4,
    "MODEL.MASK_DINO.HIDDEN_DIM": 64,
    "MODEL.MASK_DINO.ENCODER.FEEDFORWARD_DIM": 64,
    "MODEL.MASK_DINO.DECODER.FEEDFORWARD_DIM": 64,
    "MODEL.MASK_DINO.DECODER.NUM_LAYERS": 2,
    "MODEL.MASK_DINO.QUERY_SELECTION.NUM_QUERIES": 15,
    "MODEL.MASK_DINO.DENOISING.NUM_QUERIES": 8,
    "MODEL.MASK_DINO.LOSS.NUM_POINTS": 256,
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.CROP.ENABLED": False,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.STEPS": "()",
    "SEED": 3,
}


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[..., str]:
    """Writes scenes in COCO's panoptic format and registers them, with all that can be derived."""

    def make(scenes: list[Scene], kinds: tuple[str, ...] = tuple(NAMES)) -> str:
        folder = write_coco(tmp_path, {"val": scenes})
        path, maps = folder / "annotations" / "panoptic_val2017.json", folder / "panoptic_val2017"
        content = json.loads(path.read_text())
        kept = {COCO_IDS[kind] for kind in kinds}
        content["categories"] = [c for c in content["categories"] if c["id"] in kept]
        for annotation in content["annotations"]:
            segments = annotation["segments_info"]
            annotation["segments_info"] = [s for s in segments if s["category_id"] in kept]
        path.write_text(json.dumps(content))
        derived = ["--workers", "1", "--json", str(path), "--panoptic", str(maps), "--output"]
        coco_semantic.main([*derived, str(folder / "semantic")])
        instances = folder / "annotations" / "things.json"
        instances_from_panoptic.main([*derived, str(instances)])
        name = "drawn_panoptic"
        register_panoptic_folder(
            name,
            path,
            folder / "val2017",
            maps,
            content["categories"],
            instances_json=instances,
            sem_seg_root=folder / "semantic",
        )
        return name

    return make


def tiny(task: str, dataset: str, output: Path, **overrides: object) -> CfgNode:
    """A narrow model that trains and is tested on one dataset; "__" stands for "." in keys."""
    values = NARROW | {key.replace("__", "."): value for key, value in overrides.items()}
    values |= {"DATASETS.TRAIN": f"('{dataset}',)", "DATASETS.TEST": f"('{dataset}',)"}
    values |= {"OUTPUT_DIR": output, "MODEL.WEIGHTS": values.get("MODEL.WEIGHTS", "")}
    repository = Path(__file__).resolve().parents[2]
    path = repository / "configs" / task
    words = [str(word) for item in values.items() for word in item]
    return load_config(str(path), words)


def train(cfg: CfgNode) -> dict[str, dict[str, float]]:
    """Trains, and returns the results on the test set."""
    trainer = MaskDINOTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return json.loads((Path(cfg.OUTPUT_DIR) / "inference" / "results.json").read_text())


PANOPTIC = "coco/panoptic/maskdino_tiny.yaml"
SEMANTIC = "nuclei/semantic/maskdino_tiny.yaml"
INSTANCE = "nuclei/instance/maskdino_tiny.yaml"


def test_things_of_panoptic_maps(drawn: Callable[..., str]) -> None:
    scenes = make_scenes(2, (64, 96), 3)
    metadata = MetadataCatalog.get(drawn(scenes))
    content = json.loads(Path(metadata.json_file).read_text())
    assert {c["id"] for c in content["categories"]} == {COCO_IDS[kind] for kind in THINGS}
    visible = [
        (number, COCO_IDS[shape.name], int(mask.sum()), box_xywh(mask))
        for number, scene in enumerate(scenes, start=1)
        for shape, mask in scene.visible()
        if shape.name in THINGS
    ]
    assert visible == [
        (a["image_id"], a["category_id"], a["area"], a["bbox"]) for a in content["annotations"]
    ]
    assert [a["id"] for a in content["annotations"]] == list(range(1, len(visible) + 1))


def test_one_pass_judges_all_tasks(drawn: Callable[..., str], tmp_path: Path) -> None:
    results = train(tiny(PANOPTIC, drawn(make_scenes(2, (64, 96), 3)), tmp_path / "out"))
    assert results.keys() == {"panoptic_seg", "bbox", "segm", "sem_seg"}
    assert {"PQ", "PQ_th", "PQ_st"} <= results["panoptic_seg"].keys()
    assert {"AP", "AP-person", "AP-car"} <= results["segm"].keys()
    assert {"mIoU", *(f"IoU-{name}" for name in NAMES)} <= results["sem_seg"].keys()


@pytest.mark.parametrize("kinds", [THINGS, ("road", "sky")], ids=["no stuff", "no things"])
def test_datasets_with_one_kind_of_class(
    drawn: Callable[..., str], tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    name = drawn(make_scenes(2, (64, 96), 3), kinds)
    cfg = tiny(PANOPTIC, name, tmp_path / "out", MODEL__MASK_DINO__NUM_CLASSES=2)
    results = train(cfg)
    assert np.isfinite(results["sem_seg"]["mIoU"])
    assert 0 <= results["panoptic_seg"]["PQ"] <= 100
    assert results["bbox"]["AP"] >= 0 if kinds == THINGS else not results["bbox"]["AP"] > 0


def test_segment_that_its_map_lacks(drawn: Callable[..., str], tmp_path: Path) -> None:
    name = drawn(make_scenes(2, (64, 96), 3))
    path = Path(MetadataCatalog.get(name).panoptic_json)
    content = json.loads(path.read_text())
    lost = dict(content["annotations"][1]["segments_info"][0], id=4711)
    content["annotations"][1]["segments_info"].append(lost)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"000000000002\.png has no pixel of the segments \[4711\]"):
        train(tiny(PANOPTIC, name, tmp_path / "out"))


@pytest.fixture
def label_maps(tmp_path: Path) -> tuple[str, Path]:
    """Two scenes as semantic maps, with ignored pixels: (name, folder of the maps)."""
    for number, scene in enumerate(make_scenes(2, (64, 96), 3)):
        labels = np.full(scene.size, 255, np.uint8)
        for shape, mask in scene.visible():
            labels[mask] = NAMES.index(shape.name)
        for folder, pixels in (("images", scene.image), ("labels", labels)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    name = "drawn_semantic"
    images = tmp_path / "images"
    register_semantic_folder(name, tmp_path / "labels", images, NAMES, image_ext="png")
    return name, tmp_path / "labels"


def change(path: Path, function: Callable[[np.ndarray], np.ndarray]) -> None:
    Image.fromarray(function(np.array(Image.open(path)))).save(path)


def unknown_class(labels: np.ndarray) -> np.ndarray:
    labels[5:9, 5:9] = 44
    return labels


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unknown_class, r"labels/1\.png holds the values \[44\]; classes are 0 to 3"),
        (lambda labels: labels[:, :-2], r"labels/1\.png has .* \(64, 94\), but .* \(64, 96\)"),
    ],
    ids=["unknown class", "other size"],
)
def test_bad_label_maps(
    label_maps: tuple[str, Path],
    tmp_path: Path,
    spoil: Callable[[np.ndarray], np.ndarray],
    message: str,
) -> None:
    name, folder = label_maps
    change(folder / "1.png", spoil)
    with pytest.raises(DataError, match=message):
        train(tiny(SEMANTIC, name, tmp_path / "out", INPUT__LSJ__SIZE="[64, 96]"))
    # The same in an evaluation of whatever weights.
    model = MaskDINOTrainer.build_model(cfg := tiny(SEMANTIC, name, tmp_path / "out"))
    with pytest.raises(DataError, match=message):
        MaskDINOTrainer.test(cfg, model)


def test_maps_of_ignored_pixels_alone(label_maps: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = label_maps
    for path in folder.iterdir():
        change(path, lambda labels: np.full_like(labels, 255))
    results = train(tiny(SEMANTIC, name, tmp_path / "out", INPUT__LSJ__SIZE="[64, 96]"))
    assert np.isnan(results["sem_seg"]["mIoU"])


@pytest.fixture
def boxes_and_masks(tmp_path: Path) -> str:
    """Two scenes; the annotations of the first have boxes only, one of the second lacks a mask."""
    folder = write_coco(tmp_path, {"val": make_scenes(2, (64, 96), 4)})
    path = folder / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        if annotation["image_id"] == 1:
            annotation["segmentation"] = []
    content["annotations"][-2]["segmentation"] = []
    path.write_text(json.dumps(content))
    register_coco_folder("drawn_mixed", path, folder / "val2017")
    return "drawn_mixed"


def test_boxes_and_masks_mix_and_a_detector_starts_a_segmenter(
    boxes_and_masks: str, tmp_path: Path
) -> None:
    common = {"MODEL__MASK_DINO__NUM_CLASSES": 2, "INPUT__LSJ__SIZE": "[64, 96]"}
    detector = tiny(
        INSTANCE,
        boxes_and_masks,
        tmp_path / "detector",
        MODEL__MASK_DINO__MASK_ON=False,
        MODEL__MASK_DINO__QUERY_SELECTION__MASK_ENHANCED_ANCHORS="none",
        **common,
    )
    assert train(detector).keys() == {"bbox"}
    weights = tmp_path / "detector" / "model_final.pth"
    trained = torch.load(weights, weights_only=True)["model"]
    assert not any("mask" in name or "pixel_embedding" in name for name in trained)

    cfg = tiny(
        INSTANCE,
        boxes_and_masks,
        tmp_path / "segmenter",
        **common | {"MODEL__WEIGHTS": weights, "SOLVER__BASE_LR": 0.0},
    )
    results = train(cfg)
    assert results.keys() == {"bbox", "segm"}
    segmenter = torch.load(tmp_path / "segmenter" / "model_final.pth", weights_only=True)["model"]
    assert {name for name in trained if name not in segmenter} == set()
    moving = ("running_mean", "running_var", "num_batches_tracked")
    assert all(
        torch.equal(value, segmenter[name])
        for name, value in trained.items()
        if not name.endswith(moving)
    )


@pytest.mark.slow
def test_things_and_stuff_are_learned(drawn: Callable[..., str], tmp_path: Path) -> None:
    cfg = tiny(
        PANOPTIC,
        drawn(make_scenes(1, (64, 96), 3)),
        tmp_path / "out",
        SOLVER__IMS_PER_BATCH=1,
        SOLVER__MAX_ITER=200,
        SOLVER__STEPS="(150,)",
    )
    results = train(cfg)
    assert results["panoptic_seg"]["PQ"] > 50
    assert results["panoptic_seg"]["PQ_th"] > 50
    assert results["panoptic_seg"]["PQ_st"] > 50
    assert results["segm"]["AP"] > 50
    assert results["bbox"]["AP"] > 50
    assert results["sem_seg"]["mIoU"] > 50
