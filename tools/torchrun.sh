# Licensed under the Apache License, Version 2.0.
# What dist_train.sh and dist_test.sh share: run one of the tools under torchrun.
#
# The machine is one node by default. On several, run the same command on each, with
#   NNODES       how many nodes there are
#   NODE_RANK    which of them this is, from 0
#   MASTER_ADDR  the address of node 0
#   PORT         a free port of node 0 (29500)

usage() {
  echo "usage: $0 $*" >&2
  exit 2
}

fail() {
  echo "$(basename "$0"): error: $*" >&2
  exit 2
}

is_count() {
  [[ $1 =~ ^[1-9][0-9]*$ ]]
}

# torchrun_tool TOOL GPUS [argument of the tool ...]
torchrun_tool() {
  local tool=$1 gpus=$2 nodes=${NNODES:-1} root where
  shift 2
  is_count "$gpus" || fail "GPUS must be a whole number of at least 1, got '$gpus'"
  is_count "$nodes" || fail "NNODES must be a whole number of at least 1, got '$nodes'"
  python -c 'from importlib.metadata import version; version("torch")' 2>/dev/null ||
    fail "no python with torch on the PATH: activate its environment first"

  if [[ $nodes != 1 ]]; then
    [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] ||
      fail "with NNODES=$nodes, set NODE_RANK (from 0) and MASTER_ADDR (of node 0) as well"
    where=(--nnodes "$nodes" --node-rank "$NODE_RANK")
    where+=(--master-addr "$MASTER_ADDR" --master-port "${PORT:-29500}")
  elif [[ -n ${PORT:-} ]]; then
    where=(--master-addr 127.0.0.1 --master-port "$PORT")
  else
    where=(--standalone) # torchrun finds a free port: two jobs of one machine must not share one
  fi
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  exec python -m torch.distributed.run "${where[@]}" --nproc-per-node "$gpus" \
    "$root/tools/$tool" "$@" --launcher pytorch
}
