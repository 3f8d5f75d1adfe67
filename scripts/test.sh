#!/usr/bin/env bash
# Lint, types and all tests but the demo and the benchmarks (pytest -m demo, pytest -m bench).
# Makes .venv where no environment is active and installs once. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
setup '.[dev]'

echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== pytest"
# Two workers, the long files first; a file's tests share what they have trained. One thread for each, as two
# would wait for each other.
OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
