#!/usr/bin/env bash
# Stage 2: bash run_stage2.sh [cifar10|imagenet] [more flags]. The recipe is configs/resnet18.yaml; flags win over it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
train_stage main_stage2.py "$@"
