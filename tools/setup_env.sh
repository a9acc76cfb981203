#!/usr/bin/env bash
# Makes the virtual environment that the other commands use, and installs what is missing in it.
# Safe to run again: what is there is kept (torch and detectron2 too, of whatever origin), and a
# complete environment costs a second.
#
#   PYTHON=python3.12 bash tools/setup_env.sh   the interpreter of a new environment
#   VENV=/some/folder bash tools/setup_env.sh   another place than .venv
#
# Needs Python 3.10 or newer with venv, and the package index. A C++ compiler is optional: without
# one the deformable attention runs in plain PyTorch, several times slower.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
python=$venv/bin/python
panopticapi="panopticapi-lite==0.1.0"
panopticapi_sha256=3d44beed48cd61d0c408b4cf8b5c4752b666567620f175b55f0445303911f37d
export PIP_DISABLE_PIP_VERSION_CHECK=1
# In a log neither progress bars nor remarks about mirrors; errors are shown everywhere.
[ -t 1 ] || export PIP_QUIET=2

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

has_module() {
  "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3.10 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null; then
      command -v "$candidate"
      return
    fi
    [ -z "$candidate" ] || [ "$candidate" != "${PYTHON:-}" ] ||
      fail "PYTHON=$PYTHON is not a command; name a Python 3.10 or newer"
  done
  fail "no Python found; install Python 3.11 or set PYTHON to a Python 3.10 or newer"
}

make_environment() {
  if [ ! -e "$python" ]; then
    local interpreter
    interpreter=$(find_python)
    say "making $venv with $("$interpreter" --version)"
    "$interpreter" -m venv "$venv" ||
      fail "$interpreter -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$python is $("$python" --version), needed is 3.10 or newer; delete $venv or set VENV"
  "$python" -m pip --version >/dev/null ||
    fail "$venv has no pip (was its making interrupted?); delete it and run this again"
}

# Prints the lines of requirements.txt that the environment does not meet; keeps an installed
# torch, of which torchvision must be the partner, and accepts any build of OpenCV.
missing_requirements() {
  "$python" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

ALTERNATIVES = {
    "opencv-python-headless": ["opencv-python", "opencv-contrib-python"],
    "onnxruntime": ["onnxruntime-gpu"],
}


def installed(name):
    for candidate in [name, *ALTERNATIVES.get(name, [])]:
        try:
            return version(candidate)
        except PackageNotFoundError:
            continue
    return None


lines = (line.split("#")[0].strip() for line in Path("requirements.txt").read_text().splitlines())
requirements = [Requirement(line) for line in lines if line]
missing = [
    str(requirement)
    for requirement in requirements
    if not (found := installed(requirement.name))
    or not requirement.specifier.contains(found, prereleases=True)
]
if missing and (torch := installed("torch")) and not any(m.startswith("torch>") for m in missing):
    missing.append(f"torch=={torch}")
print("\n".join(missing))
PYTHON
}

install_requirements() {
  local missing
  missing=$(missing_requirements) || fail "could not read requirements.txt (see above)"
  [ -n "$missing" ] || return 0
  say "installing ${missing//$'\n'/, } (the first time this fetches several gigabytes)"
  # shellcheck disable=SC2086  # one argument per requirement; none holds a space
  "$python" -m pip install $missing ||
    fail "pip could not install the above; check the connection to the package index and the disk"
  "$python" -c 'import torch, torchvision' ||
    fail "torch and torchvision do not fit together (see above). Both must come from the same" \
      "place; run: $python -m pip uninstall -y torch torchvision, then this again"
}

install_detectron2() {
  "$python" tools/build_detectron2.py --check && return
  say "building detectron2 0.6 from its published sources"
  "$python" tools/build_detectron2.py || fail "detectron2 could not be built (see above)"
}

install_panopticapi() {
  has_module panopticapi && return
  say "installing $panopticapi"
  # Without dependencies: its metadata asks for NumPy below 2, its code does not.
  local file
  file=$(mktemp)
  printf '%s --hash=sha256:%s\n' "$panopticapi" "$panopticapi_sha256" >"$file"
  "$python" -m pip install --no-deps --require-hashes -r "$file" ||
    fail "pip could not install $panopticapi (see above)"
  rm -f "$file"
}

# One line that changes whenever the project must be installed again: the sources of the operator,
# what it is built with and for, and the libraries that the last build left.
fingerprint() {
  "$python" - "$1" <<'PYTHON'
import hashlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

settings = ("MASKDINO_BUILD_OPS", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME")
has_gpu = Path("/dev/nvidiactl").exists()
context = [sys.argv[1], version("torch"), sys.version, os.getcwd(), has_gpu]
digest = hashlib.sha256(repr([*context, *map(os.environ.get, settings)]).encode())
sources = [path for path in sorted(Path("csrc").rglob("*")) if path.is_file()]
for path in [Path("setup.py"), Path("pyproject.toml"), *sources]:
    digest.update(path.as_posix().encode() + path.read_bytes())
for library in sorted(Path("maskdino").rglob("*.so")):
    digest.update(library.as_posix().encode())
print(digest.hexdigest())
PYTHON
}

install_project() {
  local stamp=$venv/maskdino.stamp log=$venv/maskdino_install.log compiler
  # shellcheck disable=SC2086  # several names
  compiler=$(command -v ${CXX:-c++ g++ clang++} | head -n 1) || true
  if [ -z "$compiler" ]; then
    say "no C++ compiler (${CXX:-c++, g++ or clang++}): deformable attention will run in plain" \
      "PyTorch, slower. To change that, install g++ and run this again"
  fi
  [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$(fingerprint "$compiler")" ] || return 0
  say "installing the project${compiler:+ and compiling its operator with $compiler (minutes)}"
  if ! PIP_QUIET=0 "$python" -m pip install -v --no-build-isolation --no-deps -e . >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    fail "the project could not be installed; all of the log is in $log. If the compiler is at" \
      "fault, MASKDINO_BUILD_OPS=0 bash tools/setup_env.sh installs without the operator"
  fi
  grep -Eo '^ *maskdino: .*' "$log" | sort -u || true  # what was built, in the words of setup.py
  fingerprint "$compiler" >"$stamp"
}

make_environment
install_requirements
install_detectron2
install_panopticapi
install_project
say "$venv is ready; 'source $venv/bin/activate' lets a terminal use it"
