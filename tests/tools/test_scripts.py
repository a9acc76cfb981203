"""The shell commands, where they can be tried without installing anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def run(
    script: Path, folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script from another folder than its own."""
    return subprocess.run(
        ["bash", str(script)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def write_command(path: Path, text: str) -> None:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_setup_names_a_missing_interpreter(repository: Path, tmp_path: Path) -> None:
    result = run(
        repository / "tools" / "setup_env.sh",
        tmp_path,
        {"VENV": str(tmp_path / "venv"), "PYTHON": "no-such-python"},
    )
    assert result.returncode == 1
    assert "PYTHON=no-such-python is not a command" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_refuses_an_old_interpreter(repository: Path, tmp_path: Path) -> None:
    write_command(
        tmp_path / "venv" / "bin" / "python", '[ "$1" != --version ] || echo Python 3.6.9; exit 1'
    )
    result = run(repository / "tools" / "setup_env.sh", tmp_path, {"VENV": str(tmp_path / "venv")})
    assert result.returncode == 1
    assert "Python 3.6.9, needed is 3.10 or newer" in result.stderr


@pytest.mark.parametrize(
    ("tests", "check", "formatting", "expected"),
    [(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1)],
)
def test_ci_fails_if_anything_fails(
    repository: Path, tmp_path: Path, tests: int, check: int, formatting: int, expected: int
) -> None:
    clone = tmp_path / "clone"
    (clone / ".ci").mkdir(parents=True)
    shutil.copy(repository / ".ci" / "run", clone / ".ci" / "run")
    write_command(clone / "tools" / "test.sh", f"echo tests ran; exit {tests}")
    write_command(
        clone / ".venv" / "bin" / "ruff",
        f'echo "ruff $*"; [ "$1" = format ] && exit {formatting}; exit {check}',
    )
    for name in ("mypy", "clang-format"):
        write_command(clone / ".venv" / "bin" / name, "exit 0")
    subprocess.run(["git", "init", "-q", clone], check=True)
    result = run(clone / ".ci" / "run", tmp_path, {"VENV": ".venv"})
    assert result.returncode == expected
    assert result.stdout.splitlines() == ["tests ran", "ruff check .", "ruff format --check ."]
