"""Other packages in the same process, which register the same names with detectron2.

A module stands for them: like Mask2Former, OneFormer and OpenSeeD it registers a Swin and datasets,
and like a fork, where asked to, a model called MaskDINO. Registries are global, so each case is a
process of its own.
"""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import pytest
from fvcore.common.registry import Registry

from maskdino.integration import registration
from maskdino.integration.registration import (
    offer_to,
    register_all,
    register_postponed,
    tell_configuration,
    when_configuration_is_read,
)

NEIGHBOUR = """
import os
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

@BACKBONE_REGISTRY.register()
class D2SwinTransformer:
    pass

if "FORK" in os.environ:
    @META_ARCH_REGISTRY.register()
    class MaskDINO:
        pass

def load():
    return ["theirs"]

NAMES = [
    kind.format(split)
    for kind in ("coco_2017_{}_panoptic_with_sem_seg", "ade20k_instance_{}", "ade20k_panoptic_{}")
    for split in ("train", "val")
]
for name in NAMES:
    if name.startswith("coco"):
        base = MetadataCatalog.get(name.removesuffix("_with_sem_seg"))
        del base.thing_classes
        base.thing_classes = ["theirs"]
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(thing_classes=["theirs"], evaluator_type="sem_seg", mark=name)
"""

CHECK = """
from detectron2.config import get_cfg
maskdino.add_maskdino_config(get_cfg())
maskdino.add_maskdino_config(get_cfg())
from neighbour import *

def holders():
    swin = BACKBONE_REGISTRY.get("D2SwinTransformer").__module__
    model = META_ARCH_REGISTRY.get("MaskDINO").__module__
    loaders = {DatasetCatalog[name].__module__ for name in NAMES}
    marked = {MetadataCatalog.get(name).get("mark") == name for name in NAMES}
    return swin, model, loaders, marked

OURS = ("maskdino.backbones.build", "maskdino.model", {"maskdino.data.datasets"}, {False})
model = "neighbour" if "FORK" in os.environ else "maskdino.model"
assert holders() == ("neighbour", model, {"neighbour"}, {True}), holders()
maskdino.register_all(replace=True)
assert holders() == OURS, holders()
maskdino.register_all()
assert holders() == OURS, holders()
classes = MetadataCatalog.get("coco_2017_val_panoptic_with_sem_seg").thing_classes
assert len(classes) == 133, classes
"""


def run(code: str, folder: Path, repository: Path, python: str, **environment: str) -> list[str]:
    """Runs code beside the neighbour; returns what it logged about names that were taken."""
    (folder / "neighbour.py").write_text(NEIGHBOUR)
    paths = os.pathsep.join((str(folder), str(repository)))
    command = [python, "-W", "ignore", "-c", code]
    done = subprocess.run(
        command,
        cwd=repository,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("Left alone")]


@pytest.mark.parametrize("order", ["neighbour, maskdino", "maskdino, neighbour"])
def test_both_orders(order: str, tmp_path: Path, repository: Path, warm_python: str) -> None:
    (line,) = run(f"import {order}\n{CHECK}", tmp_path, repository, warm_python)
    for name in (
        "D2SwinTransformer",
        "ade20k_panoptic_val",
        "coco_2017_train_panoptic_with_sem_seg",
    ):
        assert f"{name} (of neighbour)" in line
    assert line.count("(of ") == 7 and "maskdino.register_all(replace=True)" in line


def test_fork_that_came_first_keeps_its_model(
    tmp_path: Path, repository: Path, warm_python: str
) -> None:
    code = f"import neighbour, maskdino\n{CHECK}"
    lines = run(code, tmp_path, repository, warm_python, FORK="1")
    assert len(lines) == 2 and "MaskDINO (of neighbour)" in lines[0]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of the test's own, with no other offers."""
    monkeypatch.setattr(registration, "_offers", [])
    monkeypatch.setattr(registration, "_waiting", [])
    return Registry("TEST")


def test_postponed_names_wait_and_give_way(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    @offer_to(registry)
    def now() -> None: ...

    @offer_to(registry, postponed=True)
    def later() -> None: ...

    @offer_to(registry, postponed=True)
    def taken() -> None: ...

    assert dict(registry) == {"now": now}
    registry._do_register("taken", print)
    with caplog.at_level(logging.WARNING):
        register_postponed()
        register_postponed()
    assert dict(registry) == {"now": now, "later": later, "taken": print}
    assert [record.message.count("taken (of builtins)") for record in caplog.records] == [1]
    register_all()
    assert registry.get("taken") is print
    register_all(replace=True)
    assert dict(registry) == {"now": now, "later": later, "taken": taken}


def test_who_comes_late_hears_of_the_configuration_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command may read its configuration before it needs the datasets."""
    monkeypatch.setattr(registration, "_readers", [])
    monkeypatch.setattr(registration, "_last_read", [])
    early, late = [], []
    when_configuration_is_read(early.append)
    tell_configuration("a.yaml")
    tell_configuration("b.yaml")
    when_configuration_is_read(late.append)
    assert (early, late) == (["a.yaml", "b.yaml"], ["b.yaml"])
