#!/usr/bin/env bash
# Sample from a run or an export, in one process on one GPU:  sbatch [OPTION ...] slurm/sample.sh RUN [ARGUMENT ...]
#SBATCH --job-name=sample
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source slurm/common.sh || { echo "submit this from the repository's folder, or with sbatch --chdir=IT" >&2; exit 2; }
run python -u -m mixar sample "$@"
