#!/usr/bin/env bash
# A Ray cluster of the nodes of one Slurm job, and a job on it:
#   sbatch cluster/slurm.sh configs/video_games.yaml run_dir=/shared/runs/video log.path=/shared/logs train.workers=4
# Checkout, environment, log and run directory lie on a file system of all nodes. Nodes with a GPU have the resource
# gpu_node, the others data_node; --constraint='[gpu*4&cpu*8]' takes some of both. JOB=jobs/prepare.py runs another job.
#SBATCH --job-name=lrurec
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# The time limit and preemption arrive here 5 minutes ahead, for the last checkpoint.
#SBATCH --signal=B:TERM@300
set -euo pipefail

python=${PYTHON:-.venv/bin/python}
ray=$(dirname "$python")/ray
job=${JOB:-jobs/train.py}
# Ports by the job's number: two jobs may share a node where --exclusive is taken out.
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_USAGE_STATS_ENABLED=0

# Whoever reaches Ray's ports runs code as this user, and on a login node others are one hop away. The token is in the
# environment of this job's processes alone, which srun hands on.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$("$python" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{ print $1 }')

# Runs on every node; a step of its own, so Slurm ends it with the job. Single quotes: expanded there, not here.
# shellcheck disable=SC2016
start='
    if nvidia-smi -L >/dev/null 2>&1; then kind=gpu_node; else kind=data_node; fi
    exec "$0" start --block --disable-usage-stats --resources "{\"$kind\": 1}" "$@"
'
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" bash -c "$start" "$ray" --head \
    --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 --include-dashboard=true \
    --temp-dir="/tmp/ray-$SLURM_JOB_ID" &
steps=$!
for _ in $(seq 120); do
    "$ray" health-check --address "$address:$port" >/dev/null 2>&1 && break
    kill -0 "$steps" # the head ended: so does this
    sleep 1
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --exclude="$head" \
        bash -c "$start" "$ray" --address="$address:$port" &
    steps="$steps $!"
fi

# This script runs on the first node, which is the head: the driver finds its raylet there.
RAY_ADDRESS="$address:$port" "$python" "$job" "$@" &
driver=$!
trap 'kill -TERM "$driver" 2>/dev/null || true' TERM INT
code=0
wait "$driver" || code=$?
# A signal ends `wait` at once; the driver still saves its checkpoint.
while kill -0 "$driver" 2>/dev/null; do
    code=0
    wait "$driver" || code=$?
done
# shellcheck disable=SC2086 # several process ids
kill $steps 2>/dev/null || true
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID" # try again: the same command goes on from the last checkpoint
fi
exit "$code"
