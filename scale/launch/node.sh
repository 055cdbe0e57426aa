#!/usr/bin/env bash
# The part of a Slurm job that every node runs (see slurm.sbatch): torchrun with the arguments given, and a translation.
#
# Slurm sends a signal to all processes of a step at once; this shell must outlive it, to say that the job was asked to stop.
# So Slurm is asked for SIGUSR1, which all but this shell ignore, and this shell makes of it one SIGTERM for torchrun, which
# hands it on to its ranks: they save after the step and end.
set -euo pipefail

# A store of its own for every restart: torchrun of PyTorch 2.13 would hand out the old one, with the addresses of dead ranks.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

: "${STOPPED:?the file that says that the job was asked to stop, on a file system that all nodes share}"

torchrun_id="" stopping=""
trap 'stopping=yes; [[ -z $torchrun_id ]] || kill -TERM "$torchrun_id" || true' USR1

# A signal that is ignored here stays ignored in torchrun and in all its children.
(trap '' USR1 && exec torchrun "$@") &
torchrun_id=$!

code=0
wait "$torchrun_id" || code=$?
while kill -0 "$torchrun_id" 2>/dev/null; do # `wait` also ends when the signal comes
    code=0
    wait "$torchrun_id" || code=$?
done

if [[ -n $stopping ]]; then
    touch "$STOPPED"
    exit 0 # not an error: it would make srun kill the nodes that are still saving
fi
exit "$code"
