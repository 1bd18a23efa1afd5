#!/usr/bin/env bash
# Environment, linters, types, all tests. Further arguments go to pytest: bash test.sh -k resume
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
make_environment dev
cd "$root"
[ $# -gt 0 ] || set -- --cov=biper --cov-report=term-missing:skip-covered --cov-fail-under=95
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" -m pytest "$@"
