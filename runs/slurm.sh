#!/bin/bash
# Train on several nodes of a Slurm cluster. Five minutes before its time limit, the job receives a stop signal, saves a
# checkpoint and requeues itself, until training is finished.
#
#     sbatch --nodes 4 --time 24:00:00 runs/slurm.sh gpt2 --training.micro-batch-size 32
#
# The run directory is out/PRESET. All nodes must share it and the repository.
#SBATCH --job-name=babygpt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt

preset=gpt2
if [[ "$1" != -* && -n "$1" ]]; then
    preset=$1
    shift
fi
case " $* " in *" --general.out"[-_]dir* | *" --general.init"[-_]from*)
    echo "error: this script sets --general.out-dir out/$preset and --general.init-from resume. Omit them." >&2
    exit 2
esac
if [ -e "out/$preset/finished" ]; then
    echo "The run in out/$preset has already finished."
    exit 0
fi
export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export PATH="$PWD/.venv/bin:$PATH"

# Each task runs one rank without torchrun, so that train.py itself receives the early SIGUSR1 from Slurm.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
    LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec python train.py "$@"' train "$preset" \
    --general.out-dir "out/$preset" --general.init-from resume "$@"
code=$?

# Requeue the job if the run was stopped and saved a checkpoint. Otherwise the run has finished or failed.
if [ $code = 0 ] && [ -e "out/$preset/stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
