"""The CUDA sources compile for the GPUs they claim, with nvcc alone: no GPU is needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

# The oldest; and one with vector atomics, which newer ones have as well.
ARCHITECTURES = ("arch=compute_75,code=sm_75", "arch=compute_90,code=sm_90")

SOURCES = sorted(path.name for path in (Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_compile(source: str, repository: Path, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the path")
    target = tmp_path / "kernels.o"
    command = [nvcc, "-c", "-O3", "-std=c++20", "--expt-relaxed-constexpr", "--threads", "2"]
    command += [f"-gencode={architecture}" for architecture in ARCHITECTURES]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [str(repository / "csrc" / "cuda" / source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stderr
    assert target.stat().st_size > 0
