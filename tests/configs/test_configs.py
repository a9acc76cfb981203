"""Tests of configs/ and of the keys in maskdino/config.py."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog

import maskdino.data  # noqa: F401 - registers datasets
from maskdino.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = sorted((REPOSITORY / "configs").rglob("*.yaml"))
LEAVES = [path for path in FILES if not path.name.startswith("Base-")]


def key_names(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CfgNode) and value:
            yield from key_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


OWN_KEYS = sorted(set(key_names(load_config())) - set(key_names(get_cfg())))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_configuration_loads(path: Path) -> None:
    cfg = load_config(str(path))
    assert cfg.MODEL.META_ARCHITECTURE == "MaskDINO"
    assert all(step < cfg.SOLVER.MAX_ITER for step in cfg.SOLVER.STEPS)


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_leaf_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 25


def names_used(path: Path) -> set[str]:
    """All attribute names and strings of a source file."""
    tree = ast.parse(path.read_text(), str(path))
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return attributes | {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_every_key_is_read() -> None:
    sources = set((REPOSITORY / "maskdino").rglob("*.py")) - {REPOSITORY / "maskdino" / "config.py"}
    used = set().union(*map(names_used, sources))
    unread = [key for key in OWN_KEYS if not set(key.split(".")) <= used]
    assert OWN_KEYS
    assert not unread


def test_released_schedules() -> None:
    folder = REPOSITORY / "configs" / "coco" / "instance"
    for name, epochs, drops in (
        ("maskdino_R50_12ep", 12, [11]),
        ("maskdino_R50_24ep", 24, [20]),
        ("maskdino_R50", 50, [44.444, 48.148]),
    ):
        cfg = load_config(str(folder / f"{name}.yaml"))
        assert epochs * 7375 == cfg.SOLVER.MAX_ITER
        assert [round(step / 7375, 3) for step in cfg.SOLVER.STEPS] == drops


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_datasets_are_registered(path: Path) -> None:
    cfg = load_config(str(path))
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= set(DatasetCatalog.list())


def expand(pattern: str) -> list[str]:
    """Braces as a shell expands them: "a{b,c}" is "ab" and "ac"."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for part in match[1].split(",") for name in expand(before + part + after)]


def test_readme_names_configurations_that_exist() -> None:
    text = (REPOSITORY / "configs" / "README.md").read_text()
    patterns = re.findall(r"`(?:configs/)?([\w{},/]+\.yaml)`", text)
    named = {name for pattern in patterns for name in expand(pattern) if "/" in name}
    existing = {str(path.relative_to(REPOSITORY / "configs")) for path in LEAVES}
    assert len(named) > 50
    assert named <= existing
    papers = {name for name in existing if "/ablation/" in name}
    assert papers <= named


def test_semantic_recipes_are_the_released_ones() -> None:
    for dataset, crop, steps, norm in (
        ("ade20k", [512, 512], (160000, [135000, 150000]), "FrozenBN"),
        ("cityscapes", [512, 1024], (90000, [80000, 87000]), "SyncBN"),
    ):
        cfg = load_config(str(REPOSITORY / "configs" / dataset / "semantic" / "maskdino_R50.yaml"))
        assert (cfg.SOLVER.MAX_ITER, list(cfg.SOLVER.STEPS)) == steps
        assert list(cfg.INPUT.CROP.SIZE) == crop
        low, high = min(cfg.INPUT.MIN_SIZE_TRAIN), max(cfg.INPUT.MIN_SIZE_TRAIN)
        assert (low, high) == (cfg.INPUT.MIN_SIZE_TEST // 2, cfg.INPUT.MIN_SIZE_TEST * 2)
        assert norm == cfg.MODEL.RESNETS.NORM
        node = cfg.MODEL.MASK_DINO
        assert node.LOSS.CLASSIFICATION == "cross_entropy"
        assert not node.QUERY_SELECTION.ENABLED
        assert node.QUERY_SELECTION.NUM_QUERIES == 100
        assert not node.MATCHER.DECOUPLE_STUFF_BOXES
        assert not node.LOSS.DECOUPLE_STUFF_BOXES
        assert cfg.INPUT.COLOR_AUG_SSD
        assert not cfg.INPUT.LSJ.ENABLED
