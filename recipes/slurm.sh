#!/bin/bash
# Slurm: a run on several machines, which saves before its time is over and is queued again.
# Change the lines that begin with #SBATCH, then: sbatch slurm.sh my.yaml [key.sub=value ...]
# run.dir must be a folder that all machines see.
#SBATCH --job-name=gearshift
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=gearshift-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@300

# 300 seconds before the end, Slurm signals this script, which asks the ranks to stop after a step.
queue_again=
trap 'queue_again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \
  --max-restarts=3 --shutdown-timeout=240 -m gearshift run "$@" &
step=$!
wait "$step"
code=$?
if [ -n "$queue_again" ]; then # the signal has ended the first wait
  wait "$step"
  code=$?
  [ "$code" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
