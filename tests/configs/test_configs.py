"""Tests of configs/ and of the keys in maskdino/config.py."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

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
