#!/usr/bin/env bash
# Train on this machine: one process for each GPU, or a number of processes on the CPU.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: scale/launch/one_node.sh [-n PROCESSES] [-r RESTARTS] [-l LOG_DIR] RECIPE [OPTIONS]

  -n PROCESSES   "gpu" (the default): one for each GPU; or a number, on a machine without any
  -r RESTARTS    when a process dies, start all again from the newest checkpoint, so many times (3)
  -l LOG_DIR     where the output of every rank is written (runs/logs); the first rank's is shown, too
  RECIPE         a file, or a name in configs/recipe
  OPTIONS        of scale.train: --dp, --fsdp, --ep, --run-folder, any key of the recipe

  scale/launch/one_node.sh configs/recipe/mini.toml --ep 8
  scale/launch/one_node.sh -n 4 nano --dp 2 --ep 2

Ctrl-C or SIGTERM: the run is saved after its step (torchrun then shows a SignalException and ends with code 1); the same
command goes on. `python -m scale.plan` proposes a mesh.
EOF
}

processes=gpu restarts=3 log_dir=runs/logs
while getopts "n:r:l:h" option; do
    case $option in
        n) processes=$OPTARG ;;
        r) restarts=$OPTARG ;;
        l) log_dir=$OPTARG ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if [[ $# -eq 0 || $1 == -* ]]; then
    echo "one_node.sh: found ${1:-nothing} where the recipe should be; -n, -r and -l come before it, all else after it" >&2
    usage >&2
    exit 2
fi
if [[ $processes != gpu && ! $processes =~ ^[1-9][0-9]*$ ]]; then
    echo "one_node.sh: -n $processes: wanted gpu, or a number of processes" >&2
    exit 2
fi

# scale is found from the repository's root, wherever this is called from; paths on the command line are seen from here.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# The processes share the cores. Without this, each would start as many threads as there are cores.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    shared_by=$([[ $processes == gpu ]] && echo 8 || echo "$processes")
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > shared_by ? cores / shared_by : 1))
fi

# --shutdown-timeout: after a signal torchrun kills what is still there. A checkpoint takes longer than its 30 seconds.
exec torchrun --standalone --nproc-per-node "$processes" --max-restarts "$restarts" --shutdown-timeout 900 \
    --log-dir "$log_dir" --tee 3 --local-ranks-filter 0 -m scale.train "$@"
