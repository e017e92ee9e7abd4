#!/usr/bin/env bash
# Train MixAR-H:  sbatch [OPTION ...] slurm/train_h.sh [CONFIG] [key=value ...]
#SBATCH --job-name=train_h
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source slurm/common.sh || { echo "submit this from the repository's folder, or with sbatch --chdir=IT" >&2; exit 2; }
[[ ${1:-} == *.yaml ]] || set -- configs/mixar_h.yaml "$@"
run python -u -m mixar.train "$@"
