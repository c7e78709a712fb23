#!/usr/bin/env bash
# Relabels distilled imagenette images and trains a student on them; settings: config.sh.
# Settings may be given like this, too: IPC=50 METHOD=rded bash scripts/run_imagenette.sh
# Flags after -- go to validate/train.py: bash scripts/run_imagenette.sh -- --soft-loss-scale T2

# shellcheck source=scripts/pipeline.sh
. "$(dirname "$(readlink -f "$0")")/pipeline.sh"
run_pipeline imagenette "$@"
