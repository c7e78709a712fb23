#!/usr/bin/env bash
# Relabels distilled Tiny-ImageNet images and trains a student on them. Settings come from config.sh
# or the environment, flags of validate/train.py follow --:
#   IPC=50 METHOD=rded bash scripts/run_tiny_imagenet.sh -- --soft-loss-scale T2
. "$(dirname "$(readlink -f "$0")")/pipeline.sh"
run_pipeline tiny_imagenet "$@"
