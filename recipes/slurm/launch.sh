#!/usr/bin/env bash
# Several nodes under Slurm: one accelerate launcher per node, one process per GPU. From the repository's root:
#   sbatch --nodes=2 --gpus-per-node=8 recipes/slurm/launch.sh fsdp2 train recipes/llama-3.1-8b/swahili.yaml \
#       --training.gradient_accumulation_steps=2
# Arguments: a file of recipes/accelerate without .yaml, then the arguments of `agnostic-train`. Model, text and
# output_dir must be on storage that every node can access. A restarted job resumes from its last checkpoint.
#SBATCH --job-name=agnostic_train
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

if [ "$#" -lt 3 ]; then
  echo "usage: sbatch --nodes=N --gpus-per-node=G recipes/slurm/launch.sh CONFIG STAGE RECIPE [--KEY=VALUE ...]" >&2
  exit 2
fi
config="recipes/accelerate/$1.yaml"
shift
if [ ! -f "$config" ]; then
  echo "no such config: $PWD/$config (submit from the repository's root)" >&2
  exit 2
fi
gpus="${SLURM_GPUS_ON_NODE:?run this with sbatch --gpus-per-node=G}"
if [ "$((SLURM_NNODES * gpus))" -gt 1 ] && grep -q '^distributed_type: "NO"' "$config"; then
  echo "$config starts one process, but the job has $((SLURM_NNODES * gpus)) GPUs; use ddp, or one node and GPU" >&2
  exit 2
fi
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
main_address="${hosts%%$'\n'*}"
# The port depends on the job, because two jobs may share a node; below Linux's ephemeral ports, which begin at 32768.
main_port=$((20000 + SLURM_JOB_ID % 12000))
# srun doesn't take over sbatch's --cpus-per-task.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-32}"

# SLURM_NODEID differs between nodes, so each node must expand it, not this script.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file "$1" --num_machines "$2" --num_processes "$3" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$4" --main_process_port "$5" -m agnostic_train "${@:6}"
' launch "$config" "$SLURM_NNODES" "$((SLURM_NNODES * gpus))" "$main_address" "$main_port" "$@"
