"""The command `maskdino`: which module runs, and what needs no module."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskdino.cli import main as command
from maskdino.cli import train
from maskdino.system import program


def leaves(group: command.Command, name: str) -> Iterator[tuple[str, command.Command]]:
    for word, part in group.parts.items():
        if part.parts:
            yield from leaves(part, f"{name} {word}")
        else:
            yield f"{name} {word}", part


LEAVES = dict(leaves(command.MAIN, "maskdino"))


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "maskdino", *words],
        cwd=program.REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_overview_and_mistakes_import_no_pytorch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "detectron2.py").write_text("raise SystemExit('detectron2 was imported')")
    for words in ([], ["--help"], ["prepare"], ["convert", "-h"]):
        done = run(*words, PYTHONPATH=str(tmp_path))
        assert done.returncode == 0 and done.stdout.startswith("usage: maskdino"), done.stderr
    assert run("--version", PYTHONPATH=str(tmp_path)).stdout == f"maskdino {program.VERSION}\n"
    done = run("trian", PYTHONPATH=str(tmp_path))
    expected = "error: maskdino has no command 'trian'; did you mean 'train'?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
    assert run("train", PYTHONPATH=str(tmp_path)).stderr.endswith(" was imported\n")


@pytest.mark.parametrize("words", [[], ["prepare"], ["convert"]])
def test_overview_lists_all_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    group = command.MAIN
    for word in words:
        group = group.parts[word]
    assert command.main([*words, "--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 24 and max(map(len, shown)) <= 80
    for name, part in group.parts.items():
        assert any(line.split()[:1] == [name] and part.help in line for line in shown)


@pytest.mark.parametrize("name", LEAVES)
def test_help_fits_a_screen(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["maskdino"])
    with pytest.raises(SystemExit) as ended:
        command.main([*name.split()[1:], "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"usage: {name}")
    assert len(shown) <= 50 and max(map(len, shown)) <= 100


def test_mistakes_in_groups_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["prepare", "cityscape"]) == 2
    assert "maskdino prepare has no command 'cityscape'; did you mean 'cityscapes'?" in (
        capsys.readouterr().err
    )
    assert command.main(["xyz"]) == 2
    assert "'xyz'; maskdino --help shows all" in capsys.readouterr().err


def test_evaluate_is_train_with_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["maskdino"])
    seen = []
    monkeypatch.setattr(train, "main", lambda words: seen.append(list(words)))
    assert command.main(["evaluate", "--config-file", "F"]) == 0
    assert seen == [["--eval-only", "--config-file", "F"]]
    assert sys.argv == ["maskdino evaluate", *seen[0]]


@pytest.mark.parametrize("words", [["predict"], ["prepare", "ade20k"]])
def test_without_detectron2_one_line_says_what_to_do(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['detectron2'] = None")
    done = run(*words, "--help", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, f"error: {program.NO_DETECTRON2}\n")


@pytest.mark.parametrize(
    "path", [*sorted(program.REPOSITORY.glob("datasets/*.py")), program.REPOSITORY / "demo/demo.py"]
)
def test_published_scripts_run_the_same_code(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {path.name}")


def test_a_published_script_runs_in_its_folder() -> None:
    path = program.REPOSITORY / "datasets" / "prepare_coco_semantic.py"
    command = [sys.executable, "-W", "ignore", path.name, "--help"]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {path.name}"), done.stderr
