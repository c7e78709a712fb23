#!/usr/bin/env bash
# Relabels distilled CIFAR-10 images and trains a student on them; settings: config.sh.
# Settings may be given like this, too: IPC=50 METHOD=rded bash scripts/run_cifar10.sh
# Flags after -- go to validate/train.py: bash scripts/run_cifar10.sh -- --soft-loss-scale T2

# shellcheck source=scripts/pipeline.sh
. "$(dirname "$(readlink -f "$0")")/pipeline.sh"
run_pipeline cifar10 "$@"
