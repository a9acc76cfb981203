"""Tests of configs/ and of the keys in maskdino/config/defaults.py."""

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


def paths_read(path: Path) -> set[str]:
    """Whole paths of configuration keys that a file reads: `cfg.A.B`, also by names for nodes.

    A name stands for a node inside one function, by `node = cfg.A` or a pair of those.
    """
    tree = ast.parse(path.read_text(), str(path))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return set().union(*map(_paths_read_in, functions))


def _paths_read_in(function: ast.FunctionDef) -> set[str]:
    nodes = {"cfg": ""}  # name -> path of the node, with a point at its end

    def resolved(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return nodes.get(node.id)
        if isinstance(node, ast.Attribute) and node.attr == "cfg":  # self.cfg
            return ""
        inner = resolved(node.value) if isinstance(node, ast.Attribute) else None
        return None if inner is None else f"{inner}{node.attr}."

    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                for name, value in pairs:
                    if isinstance(name, ast.Name) and (key := resolved(value)) is not None:
                        nodes[name.id] = key
    read = (n for n in ast.walk(function) if isinstance(n, ast.Attribute | ast.Name))
    read = (n for n in read if isinstance(n.ctx, ast.Load))
    return {key.rstrip(".") for key in map(resolved, read) if key}


def test_every_key_is_read() -> None:
    sources = set((REPOSITORY / "maskdino").rglob("*.py")) - {
        REPOSITORY / "maskdino" / "config" / "defaults.py"
    }
    read = set().union(*map(paths_read, sources))
    unread = [key for key in OWN_KEYS if key not in read]
    assert OWN_KEYS
    assert not unread


def test_only_whole_paths_count_as_read(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "def build(cfg):\n"
        "    node, levels = cfg.MODEL.DECODER, cfg.MODEL.ENCODER.NUM_LEVELS\n"
        "    node.NUM_HEADS = node.NUM_LAYERS\n"
        "def other(node):\n"
        "    return node.NUM_POINTS\n"
    )
    keys = {"DECODER.NUM_LAYERS", "DECODER.NUM_LEVELS", "DECODER.NUM_HEADS", "DECODER.NUM_POINTS"}
    read = paths_read(source)
    assert {f"MODEL.{key}" for key in keys} & read == {"MODEL.DECODER.NUM_LAYERS"}
    assert "MODEL.ENCODER.NUM_LEVELS" in read


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
