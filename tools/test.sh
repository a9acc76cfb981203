#!/usr/bin/env bash
# Sets up the environment and runs the tests; arguments go to pytest.
#
#   bash tools/test.sh                    everything
#   bash tools/test.sh -m "not slow"      without the slow ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Waiting threads must not take the cores from other programs, nor from each other.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

bash tools/setup_env.sh
exec "${VENV:-.venv}/bin/python" -m pytest --durations=15 "$@"
