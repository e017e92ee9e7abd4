#!/usr/bin/env bash
# Train MixAR-L:  sbatch [OPTION ...] slurm/train_l.sh [CONFIG] [key=value ...]
#SBATCH --job-name=train_l
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source slurm/common.sh || { echo "submit this from the repository's folder, or with sbatch --chdir=IT" >&2; exit 2; }
[[ ${1:-} == *.yaml ]] || set -- configs/mixar_l.yaml "$@"
run python -u -m mixar.train "$@"
