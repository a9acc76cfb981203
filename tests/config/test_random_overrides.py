"""Random overrides and files: a configuration, or one line that says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from maskdino.cli.common import errors_in_one_line
from maskdino.config import load_config
from maskdino.config.checks import RULES
from maskdino.engine.before_training import check_settings
from tests.random_inputs import depths, values

KEYS = (
    *RULES,
    "SOLVER.STEPS",
    "INPUT.LSJ.SIZE",
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "MODEL.PIXEL_MEAN",
    "MODEL.TIMM.ARGS.channels",
    "MODEL.MASK_DINO.MASK_ON",
    "MODEL.MASK_DINO.CLASS_NAMES",
    "INPUT.AUGMENTATIONS",
    "LOG.WRITERS",
    "SOLVER.BEST.METRIC",
    "OUTPUT_DIR",
)
literals = st.recursive(
    st.sampled_from(["1", "-1", "0", "2.5", "nan", "inf", "1e999", "None", "True", "'a'", "x", ""]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda x: f"[{', '.join(x)}]")
        | st.lists(inner, max_size=3).map(lambda x: f"({', '.join(x)},)")
        | inner.map(lambda x: f"{{{x}: {x}}}")
    ),
    max_leaves=5,
)
words = literals | st.text(max_size=8) | st.integers().map(str) | st.floats().map(repr)


def in_one_line(file: str | None, overrides: list[str]) -> None:
    """Asserts that a configuration is read, or refused in one line."""
    try:
        with errors_in_one_line():
            check_settings(load_config(file, overrides))
    except SystemExit as end:
        assert str(end.code).startswith("error: ") and "\n" not in str(end.code).strip(), end.code


@depths
def test_values(depth: settings) -> None:
    @depth
    @given(st.lists(st.tuples(st.sampled_from(KEYS), words), min_size=1, max_size=2))
    def holds(pairs: list[tuple[str, str]]) -> None:
        in_one_line(None, [word for pair in pairs for word in pair])

    holds()


@depths
def test_keys(depth: settings) -> None:
    part = st.sampled_from(["MODEL", "SOLVER", "MASK_DINO", "TIMM", "ARGS", "", "x"]) | st.text()

    @depth
    @given(st.lists(st.lists(part, max_size=4).map(".".join) | words, max_size=4))
    def holds(overrides: list[str]) -> None:
        in_one_line(None, overrides)

    holds()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a file."""
    return tmp_path_factory.mktemp("random") / "bad.yaml"


@depths
def test_files(depth: settings, path: Path) -> None:
    def nested(pair: tuple[str, object]) -> dict:
        value: object = pair[1]
        for name in reversed(pair[0].split(".")):
            value = {name: value}
        assert isinstance(value, dict)
        return value

    contents = st.tuples(st.sampled_from(KEYS), values).map(nested) | values

    @depth
    @given(contents, st.booleans())
    def holds(content: object, has_version: bool) -> None:
        if has_version and isinstance(content, dict):
            content = {"VERSION": 2, **content}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        in_one_line(str(path), [])

    holds()


@depths
def test_text_in_files(depth: settings, path: Path) -> None:
    pieces = st.sampled_from(
        ["MODEL", ": ", "\n", "  ", "- ", "[", "]", "{", "}", "&a", "*a", "!!"]
    )

    @depth
    @given(st.lists(pieces | st.text(max_size=3), max_size=12).map("".join))
    def holds(text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        in_one_line(str(path), [])

    holds()
