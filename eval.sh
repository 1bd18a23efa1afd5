#!/usr/bin/env bash
# Evaluate: bash eval.sh FILE [flags]. The file, a checkpoint or a packed network, knows its network and data set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
[ $# -gt 0 ] || fail "usage: bash eval.sh CHECKPOINT [flags]; a packed network in its place does too"
use_environment
# without the folder it is called from among Python's; errors and help say eval.sh
exec "$python" -u -c 'import sys; sys.path[:] = filter(None, sys.path); from biper.commands.evaluate import main; main()' "$@"
