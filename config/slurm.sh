#!/usr/bin/env bash
# One run on one or many nodes; before its time limit or a pre-emption it saves its state and requeues itself, and then goes on.
#
#     sbatch --nodes 2 --gpus-per-node 8 config/slurm.sh --config config/ct_vae.yaml --data DATA --out runs/ct
#
# Flags are train.py's; --out is needed, for the next stretch to find the run. sbatch's own flags beat the lines below. Submit from the
# repository's folder, which all nodes share with DATA; the environment needs torchrun. Not yet run on a cluster.
#SBATCH --job-name=vae3d
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1                # torchrun, which starts a process a GPU
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append                 # one log of all stretches
#SBATCH --signal=B:USR1@120                # to this script, 120 s before the end: time for a step and for writing last.pt
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

out=
words=("$@")
for i in "${!words[@]}"; do
    case ${words[i]} in
        --out) out=${words[i + 1]-} ;;
        --out=*) out=${words[i]#--out=} ;;
    esac
done
[[ -n $out ]] || { echo "slurm.sh: no run folder; add --out runs/NAME, the requeued job must find it again" >&2; exit 2; }
[[ ! -e $out/last.pt ]] || set -- --resume "$out"

endpoint=localhost:0                       # one node: torchrun takes a free port
if ((SLURM_NNODES > 1)); then
    endpoint=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))
fi
# USR1 would kill torchrun as it is; told of it, it passes it to the training processes and waits for them, less long than Slurm does
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$endpoint" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 100 train.py "$@" &
step=$!
requeue=
trap 'requeue=yes; kill -USR1 "$step" || true' USR1   # srun passes it on to torchrun on every node
trap : TERM                                # scancel, or a pre-emption that Slurm requeues itself: the tasks have it too; wait for them
code=0
while :; do
    wait "$step" && code=0 || code=$?
    kill -0 "$step" 2>/dev/null || break   # else it was a signal that ended the wait
done
if [[ -n $requeue && $code != 0 ]]; then
    echo "slurm.sh: stopped before the end of its time; requeued"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
