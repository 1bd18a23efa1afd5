#!/usr/bin/env bash
# Environment, linters, types, all tests: three at a time, since many wait, each with one thread unless OMP_NUM_THREADS
# says otherwise.
# Further arguments go to pytest, with which one test runs after the other: bash test.sh -k resume
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
make_environment dev
cd "$root"
if [ $# = 0 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # of two processes' threads
    set -- --numprocesses=3 --dist=worksteal --durations=15
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
        export COVERAGE_CORE=sysmon # before Python 3.12 counting lines would cost a third of the time
        set -- "$@" --cov=biper --cov-report=term-missing:skip-covered --cov-fail-under=95
    fi
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" -m pytest "$@"
