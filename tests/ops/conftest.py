"""What tests of the operators share: the compiled library, on a CPU, a GPU, or emulated."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.utils import cpp_extension

from maskdino.ops import _library
from maskdino.ops.ms_deform_attn import compiled_op_available


@pytest.fixture
def compiled() -> None:
    """Skips a test of the library itself where it is not built."""
    if not compiled_op_available("cpu"):
        pytest.skip(_library.why_not("cpu"))


@pytest.fixture
def cuda_library() -> None:
    """Skips where the library was built without CUDA."""
    if not compiled_op_available("cuda"):
        pytest.skip(_library.why_not("cuda"))


@pytest.fixture(scope="session")
def emulated(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    """The CUDA part of the library, compiled for the CPU."""
    compiler = shutil.which("g++")
    if compiler is None or not compiled_op_available("cpu"):
        pytest.skip("needs g++ and the compiled library")
    if not torch.compiled_with_cxx11_abi():
        pytest.skip(f"PyTorch {torch.__version__} has the old C++ ABI; a newer one shows the same")
    folder = repository / "tests" / "ops" / "emulated_cuda"
    includes = [folder, repository / "csrc", *cpp_extension.include_paths()]
    base = tmp_path_factory.getbasetemp()
    library = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-std=c++20", str(folder / "emulated.cpp")]
    command += [f"-I{path}" for path in includes] + ["-o", f"{library}.new"]
    command += [f"-L{cpp_extension.TORCH_LIB_PATH}", "-lc10", "-ltorch", "-ltorch_cpu"]
    with FileLock(f"{library}.lock"):  # of the processes of one run, the first compiles
        if not library.exists():
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            Path(f"{library}.new").rename(library)
    torch.ops.load_library(library)
    return torch.ops.maskdino_emulated
