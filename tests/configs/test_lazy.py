"""LazyConfig: the same models as from the YAML files, trained as detectron2's own command does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import SimpleTrainer, hooks
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.utils.events import JSONWriter
from omegaconf import DictConfig

from maskdino.config import load_config
from maskdino.data import build_test_mapper, build_train_mapper, register_coco_folder
from maskdino.engine.solver import build_optimizer
from maskdino.model import MaskDINO
from tests.conftest import REPOSITORY
from tests.custom.drawn import write_drawn
from tests.helpers import drawn_batch

PAIRS = {
    "coco_instance_R50": "coco/instance/maskdino_R50",
    "coco_panoptic_R50": "coco/panoptic/maskdino_R50",
    "coco_instance_swinl": "coco/instance/maskdino_swinl",
}
NAME = "drawn_lazy"
SMALL = (
    "model.encoder.num_layers=1",
    "model.encoder.sizes.feedforward_dim=64",
    "model.decoder.num_layers=2",
    "model.decoder.sizes.feedforward_dim=64",
    "model.query_selection.num_queries=10",
    "model.heads.num_classes=2",
    "model.is_thing=[True,True]",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "train.max_iter=2",
    "lr_multiplier.milestones=[1]",
    "lr_multiplier.values=[1.0,0.1]",
)


def load_lazy(name: str, *overrides: str) -> DictConfig:
    lazy = LazyConfig.load(str(REPOSITORY / "configs" / "lazy" / f"{name}.py"))
    return LazyConfig.apply_overrides(lazy, list(overrides))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("swinl")) for name in PAIRS],
)
def test_model_optimizer_and_data_are_those_of_the_yaml_file(name: str) -> None:
    swin = name.endswith("swinl")
    lazy = load_lazy(name, *(["model.backbone.pretrained=False"] if swin else []))
    cfg = load_config(
        str(REPOSITORY / "configs" / f"{PAIRS[name]}.yaml"),
        ["MODEL.DEVICE", "cpu", "MODEL.TIMM.PRETRAINED", False],
    )
    torch.manual_seed(0)
    found: MaskDINO = instantiate(lazy.model)
    torch.manual_seed(0)
    expected: MaskDINO = build_model(cfg)
    values = expected.state_dict()
    assert found.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[key]) for key, value in found.state_dict().items())
    assert found.inference == expected.inference
    assert torch.equal(found.is_thing, expected.is_thing)

    batch = drawn_batch([(32, 64)], [3])
    losses = []
    for model in (found, expected):
        torch.manual_seed(1)
        with torch.no_grad():
            losses.append(model.train()(batch))
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(loss, losses[1][key]) for key, loss in losses[0].items())

    lazy.optimizer.params.model = found
    groups = [
        [(group["lr"], group["weight_decay"], len(group["params"])) for group in o.param_groups]
        for o in (instantiate(lazy.optimizer), build_optimizer(cfg, expected))
    ]
    assert groups[0] == groups[1]
    assert lazy.optimizer.clip_norm == cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert tuple(lazy.lr_multiplier.milestones) == cfg.SOLVER.STEPS
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.train.eval_period == cfg.TEST.EVAL_PERIOD
    train, test = lazy.dataloader.train, lazy.dataloader.test
    assert train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert (train.dataset.names,) == cfg.DATASETS.TRAIN
    assert (test.dataset.names,) == cfg.DATASETS.TEST
    for mapper, built in (
        (instantiate(train.mapper), build_train_mapper(cfg)),
        (instantiate(test.mapper), build_test_mapper(cfg)),
    ):
        assert type(mapper) is type(built)
        assert attributes(mapper) == attributes(built)


def attributes(mapper: object) -> dict[str, object]:
    """What a mapper was made with; augmentations as text."""
    known = vars(mapper) | {"augmentations": str(mapper.augmentations)}
    sizes = [list(a.size) for a in mapper.augmentations.augs if hasattr(a, "min_scale")]
    return known | {"sizes": sizes}


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[None]:
    drawn = write_drawn(tmp_path / "drawn", 4)
    register_coco_folder(NAME, drawn.json_file, drawn.images)
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.mark.usefixtures("dataset")
def test_trains_as_the_command_of_detectron2_does(tmp_path: Path) -> None:
    """As tools/lazyconfig_train_net.py of detectron2: what it asks of a configuration is there."""
    lazy = load_lazy(
        "coco_instance_R50",
        *SMALL,
        f"dataloader.train.dataset.names={NAME}",
        f"dataloader.test.dataset.names={NAME}",
        f"train.output_dir={tmp_path / 'out'}",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        "dataloader.train.mapper.augmentations.1.size=[64,64]",
    )
    (tmp_path / "out").mkdir()
    model = instantiate(lazy.model).to("cpu")
    lazy.optimizer.params.model = model
    trainer = SimpleTrainer(model, instantiate(lazy.dataloader.train), instantiate(lazy.optimizer))
    checkpointer = DetectionCheckpointer(model, lazy.train.output_dir, trainer=trainer)
    results = []

    def evaluate() -> dict:
        test, evaluator = lazy.dataloader.test, lazy.dataloader.evaluator
        results.append(inference_on_dataset(model, instantiate(test), instantiate(evaluator)))
        return results[-1]

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(lazy.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **lazy.train.checkpointer),
            hooks.EvalHook(lazy.train.eval_period, evaluate),
            hooks.PeriodicWriter([JSONWriter(str(tmp_path / "out" / "metrics.json"))], period=1),
        ]
    )
    trainer.train(0, lazy.train.max_iter)
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    logged = {key: value for line in lines for key, value in json.loads(line).items()}
    assert logged["loss_mask_dice"] > 0.1
    assert logged["lr"] == pytest.approx(1e-5)
    assert {"bbox", "segm"} == results[0].keys()
    assert (tmp_path / "out" / "model_final.pth").is_file()
