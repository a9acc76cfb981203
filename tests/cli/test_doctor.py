"""What the doctor finds, where all is well and where something is missing or broken."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

import maskdino
from maskdino.cli import doctor, install_detectron2
from maskdino.ops import ms_deform_attn
from tests.conftest import REPOSITORY

Captured = pytest.CaptureFixture[str]


def test_all_is_well_here(capsys: Captured) -> None:
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"maskdino {maskdino.__version__} in {REPOSITORY / 'maskdino'}\n")
    assert f"torch {torch.__version__}" in shown and "detectron2 " in shown
    choice = ms_deform_attn.choose_backend("cpu", "auto")
    assert f"cpu: {choice}" in shown
    assert "objects scored by nuclei/instance/maskdino_tiny" in shown
    assert shown.endswith("all is well\n")


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Lets packages be missing."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in names else find(name, *rest),
    )


def test_what_every_command_needs_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    hide(monkeypatch, "detectron2", "timm", "av", "openvino")
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    faults = shown.partition("to mend:\n")[2].splitlines()
    assert faults == [
        "  detectron2 is not installed: maskdino doctor --install-detectron2",
        "  timm is not installed: pip install timm",
    ]
    assert "  without av, for videos: pip install 'maskdino[video]'" in shown.splitlines()
    openvino = (
        "  without openvino, for prediction with exported models: pip install 'maskdino[openvino]'"
    )
    assert openvino in shown.splitlines()


def test_a_package_that_fails_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    class Fails:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "timm":
                raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)
    monkeypatch.setattr(sys, "meta_path", [Fails(), *sys.meta_path])
    assert doctor.main([]) == 1
    expected = (
        "timm cannot be imported (operator torchvision::nms does not exist): pip install timm"
    )
    assert expected in capsys.readouterr().out


def test_an_operator_that_computes_something_else_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    original = ms_deform_attn.ms_deform_attn
    monkeypatch.setattr(
        ms_deform_attn, "ms_deform_attn", lambda *arguments: original(*arguments) + 1e-3
    )
    assert doctor.main([]) == 1
    assert "BROKEN cpu: ArithmeticError: the " in capsys.readouterr().out


def test_a_form_that_is_asked_for_but_missing_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("MASKDINO_OP", "triton")
    assert doctor.main([]) == 1
    assert "environment variable MASKDINO_OP asks for the Triton operator" in (
        capsys.readouterr().out
    )


def test_a_model_without_numbers_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    from maskdino import api

    class Broken(api.MaskDINO):
        def forward(self, *_: object) -> list:
            raise FloatingPointError("no numbers")

    monkeypatch.setattr(api, "MaskDINO", Broken)
    assert doctor.main([]) == 1
    assert "cpu: FloatingPointError: no numbers" in capsys.readouterr().out


def test_detectron2_is_installed_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(install_detectron2, "main", asked.append)
    assert doctor.main(["--install-detectron2"]) == 0
    assert asked == [[]]

    def fails(_: list[str]) -> ModuleType:
        raise install_detectron2.BuildError("the index cannot be reached")

    monkeypatch.setattr(install_detectron2, "main", fails)
    with pytest.raises(doctor.CommandError, match="the index cannot be reached"):
        doctor.main(["--install-detectron2"])


@pytest.mark.parametrize(("newer", "expected"), [(True, "main branch"), (False, "release 0.6")])
def test_versions_tell_which_detectron2(
    monkeypatch: pytest.MonkeyPatch, newer: bool, expected: str
) -> None:
    import detectron2
    from detectron2.utils import comm

    monkeypatch.delattr(comm, "create_local_process_group", raising=False)
    if newer:
        monkeypatch.setattr(comm, "create_local_process_group", None, raising=False)
    assert doctor.version_of(detectron2).endswith(f"({expected})")
