#!/usr/bin/env bash
# Environment, linters, types, all tests: two files at a time, each with one thread unless OMP_NUM_THREADS says otherwise.
# Further arguments go to pytest, with which one test runs after the other: bash test.sh -k resume
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
make_environment dev
cd "$root"
if [ $# = 0 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    set -- --numprocesses=2 --dist=loadfile --cov=biper --cov-report=term-missing:skip-covered --cov-fail-under=95 --durations=15
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" -m pytest "$@"
