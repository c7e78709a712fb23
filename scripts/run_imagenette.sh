#!/usr/bin/env bash
# Relabels distilled imagenette images and trains a student on them. Settings come from config.sh
# or the environment, flags of validate/train.py follow --:
#   IPC=50 METHOD=rded bash scripts/run_imagenette.sh -- --soft-loss-scale T2
. "$(dirname "$(readlink -f "$0")")/pipeline.sh"
run_pipeline imagenette "$@"
