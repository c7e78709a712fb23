#!/usr/bin/env bash
# Relabels distilled CIFAR-100 images and trains a student on them; settings: config.sh.
# Flags after -- go to validate/train.py: bash scripts/run_cifar100.sh -- --soft-loss-scale T2
if [ -z "${BASH_VERSION:-}" ] || [ -o posix ]; then # started by sh
    exec env -u POSIXLY_CORRECT -u SHELLOPTS bash "$0" "$@"
fi
set -euo pipefail

# shellcheck source=scripts/pipeline.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/pipeline.sh"
run_pipeline cifar100 "$@"
