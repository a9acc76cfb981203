"""The build of the compiled operators under csrc/; pyproject.toml says all else.

Environment variables:
    MASKDINO_BUILD_OPS=0   build no operators: a pure Python install that runs the PyTorch forms.
    FORCE_CUDA=1           build the CUDA part although this machine has no GPU.
    TORCH_CUDA_ARCH_LIST   GPU architectures, for example "8.0;9.0+PTX"; by default those of the
                           GPUs of this machine, and without one those of CUDA_ARCHITECTURES
                           that nvcc knows, the last also as PTX for newer GPUs.

The CPU part is built wherever torch and a C++ compiler (GCC or Clang) are found, the CUDA part too
where nvcc, a CUDA build of torch and a GPU are found. What was chosen is printed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
COMPILER_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr"]


def say(message: str) -> None:
    """Print a line that pip shows with -v and setup.py always."""
    print(f"maskdino: {message}", file=sys.stderr)


def has_compiler() -> bool:
    """Tell whether a C++ compiler that understands GCC's vector types is there."""
    named = os.environ.get("CXX")
    candidates = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    return os.name == "posix" and any(shutil.which(name) for name in candidates)


def locate_toolkit() -> None:
    """Set CUDA_HOME from nvcc itself, which may be a link or script far from its headers."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ:
        return
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    tops = [line.partition("TOP=")[2].strip() for line in answer.splitlines() if "TOP=" in line]
    if tops:
        os.environ["CUDA_HOME"] = os.path.realpath(tops[0])


def known_architectures(nvcc: Path) -> list[str]:
    """Return those of CUDA_ARCHITECTURES that this nvcc can compile for."""
    command = [nvcc, "--list-gpu-arch"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    known = re.findall(r"compute_(\d+)", answer)
    return [name for name in CUDA_ARCHITECTURES if name.replace(".", "") in known]


def built_architectures() -> str:
    """Return what torch will ask nvcc for, such as "sm_90,compute_90"; empty where unknown."""
    from torch.utils import cpp_extension

    flags = getattr(cpp_extension, "_get_cuda_arch_flags", list)()
    return ",".join(flag.rpartition("code=")[2] for flag in flags)


def choose_architectures(nvcc: Path) -> None:
    """Set TORCH_CUDA_ARCH_LIST, where nobody did, to all that nvcc and torch know."""
    names = known_architectures(nvcc)
    while names and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names) + "+PTX"
        try:
            built_architectures()
        except ValueError:  # an nvcc newer than torch
            del os.environ["TORCH_CUDA_ARCH_LIST"]
            names.pop()


def wants_cuda() -> bool:
    """Decide whether to build the CUDA part, and say why not.

    Raises:
        RuntimeError: FORCE_CUDA=1 where CUDA code cannot be built.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    forced = os.environ.get("FORCE_CUDA", "0") == "1"
    missing = []
    if torch.version.cuda is None:
        missing.append("a CUDA build of torch")
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        missing.append("nvcc (set CUDA_HOME)")
    if missing and forced:
        raise RuntimeError(f"FORCE_CUDA=1, but there is no {' and no '.join(missing)}")
    if not missing and not forced and not torch.cuda.is_available():
        missing.append("GPU (FORCE_CUDA=1 builds without one)")
    if missing:
        say(f"building operators for the CPU only: no {' and no '.join(missing)}")
        return False
    if not torch.cuda.is_available():
        choose_architectures(Path(CUDA_HOME) / "bin" / "nvcc")
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "those of the GPUs found")
    say(f"building operators for the CPU and CUDA, architectures {architectures}")
    return True


def operators() -> dict:
    """Return the setup() arguments that build csrc/, empty for a pure Python install.

    Raises:
        RuntimeError: FORCE_CUDA=1 where nothing can be compiled.
    """
    if os.environ.get("MASKDINO_BUILD_OPS", "1") == "0":
        say("MASKDINO_BUILD_OPS=0: pure Python install, operators run in PyTorch")
        return {}
    locate_toolkit()  # before torch looks for it
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        say(
            f"torch cannot be imported ({error}): pure Python install, operators run in PyTorch; "
            "to build them install torch first and use pip install --no-build-isolation"
        )
        return {}
    if not has_compiler():
        if os.environ.get("FORCE_CUDA", "0") == "1":
            raise RuntimeError("FORCE_CUDA=1, but there is no C++ compiler (GCC or Clang)")
        say("no C++ compiler (GCC or Clang): pure Python install, operators run in PyTorch")
        return {}
    sources = sorted(relative("csrc", "*.cpp") + relative("csrc/cpu", "*.cpp"))
    # torch's thread loops are inline functions that run serially unless compiled with OpenMP.
    openmp = (
        ["-fopenmp"] if torch.backends.openmp.is_available() and sys.platform == "linux" else []
    )
    flags = {"cxx": COMPILER_FLAGS + openmp}
    extension = CppExtension
    if wants_cuda():
        extension = CUDAExtension
        sources += sorted(relative("csrc/cuda", "*.cpp") + relative("csrc/cuda", "*.cu"))
        flags["nvcc"] = NVCC_FLAGS
        # The library tells at run time which GPUs it serves.
        flags["cxx"] = [*flags["cxx"], f"-DMASKDINO_CUDA_ARCHITECTURES={built_architectures()}"]
    headers = [path for pattern in ("*.h", "*.cuh") for path in relative("csrc", f"**/{pattern}")]
    built = extension(
        "maskdino._C",
        sources,
        depends=headers,
        extra_compile_args=flags,
        extra_link_args=openmp,
    )
    return {
        "ext_modules": [built],
        "cmdclass": {"build_ext": BuildExtension},
    }


class BuildPython(build_py):
    """Also packs the configurations, where `maskdino.model_zoo` looks for them."""

    def run(self) -> None:
        """Copies Python files, then the configurations."""
        super().run()
        if not self.editable_mode:
            packed = Path(self.build_lib) / "maskdino" / "model_zoo" / "configs"
            shutil.rmtree(packed, ignore_errors=True)
            shutil.copytree(ROOT / "configs", packed)


def relative(folder: str, pattern: str) -> list[str]:
    """List files relative to the root, as setuptools wants them."""
    return [str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern)]


built_operators = operators()
setup(
    cmdclass={"build_py": BuildPython, **built_operators.pop("cmdclass", {})},
    **built_operators,
)
