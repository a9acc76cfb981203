"""Which program a process is, and what importing the package does there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskdino.system import program


def is_command(monkeypatch: pytest.MonkeyPatch, argv: list[str], started: list[str]) -> bool:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", ["python", *started])
    return program.is_command()


@pytest.mark.parametrize(
    ("argv", "started", "expected"),
    [
        (["/bin/maskdino", "train"], ["/bin/maskdino", "train"], True),
        (["C:\\maskdino.exe"], ["C:\\maskdino.exe"], os.name == "nt"),
        (["-m", "train"], ["-m", "maskdino", "train"], True),
        (["-m", "train"], ["-W", "ignore", "-m", "maskdino", "train"], True),
        (["-m", "train"], ["-um", "maskdino", "train"], True),
        (["-m"], ["-m", "maskdino.cli.train"], False),
        (["-m", "maskdino"], ["-m", "pytest", "maskdino"], False),
        (["-c"], ["-c", "import maskdino"], False),
        (["script.py", "maskdino"], ["script.py", "maskdino"], False),
        # A process that the command starts gets its line, but was started otherwise.
        (["/bin/maskdino", "train"], ["-c", "from multiprocessing.spawn import x"], False),
        ([""], [], False),
    ],
)
def test_commands_are_told_from_imports(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], started: list[str], expected: bool
) -> None:
    assert is_command(monkeypatch, argv, started) is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"KMP_BLOCKTIME": "0"}, {"KMP_BLOCKTIME": "0"}),
    ],
)
def test_threads_wait_as_the_user_said(given: dict, expected: dict) -> None:
    program.wait_briefly(given)
    assert given == expected


def spin_count(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """GOMP_SPINCOUNT in the environment that PyTorch was loaded with; "None" without."""
    hook = folder / "sitecustomize.py"
    hook.write_text(
        "import sys, os\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print('spins', os.environ.get('GOMP_SPINCOUNT'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
    )
    waiting = {name: value for name, value in os.environ.items() if name not in program.WAITING}
    done = subprocess.run(
        [sys.executable, *command],
        env={**waiting, "PYTHONPATH": f"{folder}{os.pathsep}{program.REPOSITORY}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("spins "), done.stderr
    return done.stdout.split()[1]


@pytest.mark.parametrize(
    ("command", "environment", "expected"),
    [
        (["-m", "maskdino", "train", "--help"], {}, "1000"),
        (["-m", "maskdino", "train", "--help"], {"OMP_WAIT_POLICY": "PASSIVE"}, "None"),
        (["-m", "maskdino", "train", "--help"], {"GOMP_SPINCOUNT": "5"}, "5"),
        (["tools/train_net.py", "--help"], {}, "1000"),
        (["demo/demo.py", "--help"], {}, "1000"),
        (["-c", "import maskdino"], {}, "None"),
    ],
)
def test_commands_settle_waiting_before_pytorch_is_loaded(
    tmp_path: Path, command: list[str], environment: dict[str, str], expected: str
) -> None:
    command = [str(program.REPOSITORY / w) if w.endswith(".py") else w for w in command]
    assert spin_count(command, tmp_path, environment) == expected


def test_importing_without_detectron2_says_what_to_do() -> None:
    code = "import sys; sys.modules['detectron2'] = None; import maskdino"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {program.NO_DETECTRON2}"
    assert "maskdino doctor --install-detectron2" in program.NO_DETECTRON2


def test_names_of_the_package_are_those_of_its_modules(warm_python: str) -> None:
    code = (
        "import json, maskdino\n"
        "print(json.dumps([maskdino.__all__, [hasattr(maskdino, n) for n in maskdino.__all__]]))"
    )
    command = [warm_python, "-W", "ignore", "-c", code]
    names, there = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert {"MaskDINO", "MaskDINOPredictor", "model_zoo", "register_all"} <= set(names)
    assert all(there)


def test_commands_do_not_repeat_the_deprecations_of_others(tmp_path: Path) -> None:
    command = [sys.executable, str(program.REPOSITORY / "tools" / "analyze_model.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
