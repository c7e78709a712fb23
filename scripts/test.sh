#!/usr/bin/env bash
# Prepares the environment and runs the tests; arguments go to pytest.
set -euo pipefail

source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
explain "$@"
use_environment requirements-dev.txt
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
PATH="$(dirname "$PYTHON"):$PATH" shellcheck scripts/*.sh benchmarks/*.sh config.sh .ci/run
# A test file's work fits one thread; two processes take two cores better than two threads do.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
