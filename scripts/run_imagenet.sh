#!/usr/bin/env bash
# Relabels distilled ImageNet-1K images and trains a student on them; settings: config.sh.
# Flags after -- go to validate/train.py: bash scripts/run_imagenet.sh -- --soft-loss-scale T2
if [ -z "${BASH_VERSION:-}" ] || [ -o posix ]; then # started by sh
    exec env -u POSIXLY_CORRECT -u SHELLOPTS bash "$0" "$@"
fi
set -euo pipefail

# shellcheck source=scripts/pipeline.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/pipeline.sh"
run_pipeline imagenet1k "$@"
