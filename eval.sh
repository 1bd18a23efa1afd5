#!/usr/bin/env bash
# Evaluate: bash eval.sh CHECKPOINT [flags]. The checkpoint knows its network and data set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
[[ ${1:--} != -* ]] || fail "usage: bash eval.sh CHECKPOINT [flags]"
use_environment
exec "$python" -u -m biper --evaluate "$@"
