#!/usr/bin/env bash
# Sets up the environment and runs the tests; arguments go to pytest.
#
#   bash tools/test.sh                    everything
#   bash tools/test.sh -m "not slow"      without the slow ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_env.sh
exec "${VENV:-.venv}/bin/python" -m pytest --durations=15 "$@"
