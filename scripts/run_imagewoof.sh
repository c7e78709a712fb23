#!/usr/bin/env bash
# Relabels distilled imagewoof images and trains a student on them. Settings come from config.sh
# or the environment, flags of validate/train.py follow --:
#   IPC=50 METHOD=rded bash scripts/run_imagewoof.sh -- --soft-loss-scale T2
. "$(dirname "$(readlink -f "$0")")/pipeline.sh"
run_pipeline imagewoof "$@"
