#!/bin/bash
# Machines of 8 GPUs under slurm, and an output folder that all of them see:
#   sbatch --nodes 8 training_scripts/launch/slurm.sh training_scripts/accelerate/fsdp2.yaml \
#     training_scripts/train_flow_matching.py --config my-run.json --output_dir /shared/my-run
# Five minutes before the end each process gets SIGTERM, saves a checkpoint and ends; slurm queues the job again, which
# goes on from there.
#SBATCH --job-name=flow-matching
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

GPUS_OF_NODE=${GPUS_OF_NODE:-8}
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
CONFIG=$1
shift

# One launcher on each machine: accelerate starts the processes of its GPUs.
export MASTER CONFIG GPUS_OF_NODE
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG" \
  --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS_OF_NODE))" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$MASTER" --main_process_port "${MASTER_PORT:-29500}" --rdzv_backend static "$@"' launch "$@" \
  --resume_from_checkpoint latest
