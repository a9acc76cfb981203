"""Whoever imports a name of the released code is told what to use."""

import importlib
import sys

import pytest

import maskdino
from maskdino.integration import released_names
from maskdino.integration.released_names import MODULES, NAMES


@pytest.mark.parametrize("name", [*NAMES, *MODULES])
def test_a_released_name_answers_in_one_line(name: str) -> None:
    package, _, last = name.rpartition(".")
    line = f"{name} is of the released .*; use {({**NAMES, **MODULES})[name][0]}"
    for statement in (f"from {package} import {last}", f"import {name}", f"import {name}.more"):
        with pytest.raises(ImportError, match=line) as e:
            exec(statement)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", [*NAMES, *MODULES])
def test_replacements_exist(name: str) -> None:
    replacement = {**NAMES, **MODULES}[name][0]
    try:
        importlib.import_module(replacement)
    except ModuleNotFoundError:
        module, _, last = replacement.rpartition(".")
        assert hasattr(importlib.import_module(module), last)


def test_attributes() -> None:
    with pytest.raises(AttributeError, match=r"use maskdino\.data\.InstanceMapper"):
        _ = maskdino.DetrDatasetMapper
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = maskdino.nothing
    assert not hasattr(maskdino, "InstanceSegEvaluator")
    with pytest.raises(ModuleNotFoundError, match="No module named 'maskdino.nothing'"):
        importlib.import_module("maskdino.nothing")


def test_it_stands_behind_all_others_once() -> None:
    released_names.install()
    names = [type(finder).__name__ for finder in sys.meta_path]
    assert names.count("_Answers") == 1
