#!/usr/bin/env bash
# Sets up the environment and runs the tests; arguments go to pytest.
#
#   bash tools/test.sh                    everything
#   bash tools/test.sh -m "not slow"      without the slow ones
#   bash tools/test.sh -m campaign        the campaigns, which nothing else runs; minutes to hours
#   TEST_PROCESSES=4 bash tools/test.sh   in four processes (each needs up to 4 GB) instead of two
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Waiting threads must not take the cores from other programs, nor from each other.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

bash tools/setup_env.sh
exec "${VENV:-.venv}/bin/python" -m pytest --durations=15 \
  --numprocesses "${TEST_PROCESSES:-2}" --dist loadscope --no-loadscope-reorder "$@"
