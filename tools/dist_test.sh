#!/usr/bin/env bash
# Licensed under the Apache License, Version 2.0.
# Evaluate a checkpoint on several GPUs, or in several processes on a machine that has none.
# Several nodes: see torchrun.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"

[[ $# -ge 3 ]] || usage "CONFIG CHECKPOINT GPUS [argument of tools/test.py ...]"
torchrun_tool test.py "$3" "$1" "$2" "${@:4}"
