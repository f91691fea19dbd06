#!/bin/bash
# One stage on an allocation of Slurm, a job each:
#
#   sbatch cluster/slurm.sh s2t collect --recipe paper/qwen2.5-1.5b-32b --output "$PWD/runs/pair/train"
#   sbatch --nodes=4 cluster/slurm.sh s2t collect --recipe paper/qwen2.5-1.5b-32b --output "$PWD/runs/pair/train" \
#       --set collect.rollout.actors=16 --set collect.label.actors=16
#
# The same Ray cluster is started on every node: the head on the first, where the stage runs, workers on the others. It
# ends with the stage, whose exit status is the job's. A job that was killed goes on where it stopped, and so does one
# that comes to its time limit: five minutes before, it goes back into the queue.
#SBATCH --job-name=s2t
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
set -euo pipefail
if [[ $# -eq 0 ]]; then
    echo "usage: sbatch [OPTIONS] cluster/slurm.sh s2t STAGE ..." >&2
    exit 2
fi

# Where the packages are, and on storage that all nodes share.
source "${S2T_VENV:-$SLURM_SUBMIT_DIR/.venv}/bin/activate"
export OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0

# Whoever reaches a Ray cluster may run anything on it: this one asks for a token, made for this job alone.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray/s2t-$SLURM_JOB_ID.token"
mkdir -p "$HOME/.ray"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH")
# Ray ends with 0 where it cannot start, so the stage leaves its own status here.
export S2T_STATUS_PATH="$HOME/.ray/s2t-$SLURM_JOB_ID.status"
rm -f "$S2T_STATUS_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH" "$S2T_STATUS_PATH"' EXIT
# `--requeue` is for nodes that fail. Before the time limit Slurm signals this shell, and it asks for the same itself;
# Slurm then ends what runs.
trap 'echo "slurm.sh: the time limit is near: back into the queue" >&2; scontrol requeue "$SLURM_JOB_ID"' USR1

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address="${nodes[0]}:6379"
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
srun --ntasks="${#nodes[@]}" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    ray symmetric-run --address "$address" --min-nodes "${#nodes[@]}" \
    --num-cpus "$SLURM_CPUS_PER_TASK" --metrics-export-port 8080 \
    -- env RAY_ADDRESS="$address" bash -c '"$@"; status=$?; echo $status > "$S2T_STATUS_PATH"; exit $status' s2t "$@" &
srun=$!
# A shell hears a signal while it waits, and then waits no longer.
while kill -0 "$srun" 2> /dev/null; do wait "$srun" || true; done
status=$(cat "$S2T_STATUS_PATH" 2> /dev/null) || {
    echo "slurm.sh: the stage left no exit status: Ray did not start, or was ended before it; see above" >&2
    status=1
}
exit "$status"
