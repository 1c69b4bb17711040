#!/usr/bin/env bash
# Set everything up on a fresh machine, then lint, type-check and test: ./tests/run.sh [pytest arguments]
# Without arguments the quick suite runs; `./tests/run.sh -m "slow and not gpu"` runs the longer proofs, `-m long` the longest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup dev
.venv/bin/ruff format --check --quiet .
.venv/bin/ruff check --quiet .
.venv/bin/pyright --pythonpath .venv/bin/python
if [[ $# -eq 0 ]]; then
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two workers, each of which starts ranks of its own
  set -- -m "not slow and not long and not gpu" -n 2 --dist loadfile
fi
exec .venv/bin/python -m pytest "$@"
