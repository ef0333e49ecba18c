#!/usr/bin/env bash
# Licensed under the Apache License, Version 2.0.
# Train on the GPUs of a Slurm cluster, one task per GPU. Environment variables:
#   GPUS           how many in total (8)
#   GPUS_PER_NODE  how many on each node (GPUS, at most 8)
#   CPUS_PER_TASK  cores for each, of which the data loader's workers take one each (5)
#   SRUN_ARGS      more arguments for srun
#   PORT           a free port of the first node (29500): jobs that share a node need one each
set -euo pipefail

if [[ $# -lt 4 ]]; then
  echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [argument of tools/train.py ...]" >&2
  exit 2
fi
for name in GPUS GPUS_PER_NODE CPUS_PER_TASK; do
  if [[ ! ${!name:-1} =~ ^[1-9][0-9]*$ ]]; then
    echo "$(basename "$0"): error: $name must be a whole number of at least 1, got '${!name}'" >&2
    exit 2
  fi
done

gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
read -ra srun_args <<<"${SRUN_ARGS:-}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export MASTER_PORT=${PORT:-29500}
exec srun --partition "$1" --job-name "$2" --gres "gpu:$per_node" \
  --ntasks "$gpus" --ntasks-per-node "$per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" \
  --kill-on-bad-exit=1 ${srun_args[@]+"${srun_args[@]}"} \
  python -u "$root/tools/train.py" "$3" --work-dir "$4" --launcher slurm "${@:5}"
