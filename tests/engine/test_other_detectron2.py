"""A training goes on under another release of detectron2, and back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import detectron2
import pytest
import torch

from tests.conftest import REPOSITORY
from tests.engine.stand_in import read_checkpoint, tiny_config, train

VARIABLE = "MASKDINO_OTHER_DETECTRON2"
SCRIPT = """
import sys
from pathlib import Path
import detectron2
from tests.engine.stand_in import tiny_config, train

print(Path(detectron2.__file__).resolve(), flush=True)
cfg = tiny_config(Path(sys.argv[1]), "SOLVER.MAX_ITER", 12)
print(train(cfg, resume=True, kill_after=int(sys.argv[2])).start_iter)
"""


@pytest.fixture
def other() -> Path:
    """The folder that holds the package `detectron2` of another release, from its variable."""
    if VARIABLE not in os.environ:
        pytest.skip(f"{VARIABLE} does not say where another release of detectron2 is")
    folder = Path(os.environ[VARIABLE]).resolve()
    assert (folder / "detectron2" / "__init__.py").is_file(), f"no detectron2 in {folder}"
    return folder


def test_resumes_under_another_release_and_back(other: Path, tmp_path: Path) -> None:
    """Four iterations here, four there, four here; the last weights are those of twelve here."""
    here = Path(detectron2.__file__).resolve().parents[1]
    assert other != here, f"{VARIABLE} is where this process has its detectron2 from"
    straight = tmp_path / "straight"
    train(tiny_config(straight, "SOLVER.MAX_ITER", 12))
    folder = tmp_path / "in_turn"
    alone = tmp_path / "packages" / "detectron2"  # a checkout has more, such as tests
    alone.parent.mkdir()
    for packages, last in ((here, 4), (other, 8), (here, 12)):
        alone.unlink(missing_ok=True)
        alone.symlink_to(packages / "detectron2")
        environment = {**os.environ, "PYTHONPATH": str(alone.parent)}
        command = [sys.executable, "-c", SCRIPT, str(folder), str(last)]
        done = subprocess.run(
            command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == (0 if last == 12 else -9), done.stderr
        assert done.stdout.startswith(f"{packages}{os.sep}detectron2")
        name = "model_final.pth" if last == 12 else f"model_{last - 1:07d}.pth"
        assert (folder / "last_checkpoint").read_text() == name
    assert done.stdout.splitlines()[-1] == "8"
    found, expected = read_checkpoint(folder), read_checkpoint(straight)
    assert found["iteration"] == expected["iteration"] == 11
    torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=0)
