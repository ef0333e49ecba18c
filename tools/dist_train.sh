#!/usr/bin/env bash
# Licensed under the Apache License, Version 2.0.
# Train on several GPUs, or in several processes on a machine that has none.
# Several nodes: see torchrun.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"

[[ $# -ge 2 ]] || usage "CONFIG GPUS [argument of tools/train.py ...]"
torchrun_tool train.py "$2" "$1" "${@:3}"
