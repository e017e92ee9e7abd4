#!/usr/bin/env bash
# Images to shards, shared by the elements of an array:  sbatch [OPTION ...] slurm/prepare.sh [CONFIG] [key=value ...]
# An element that has finished its share takes over missing parts that nobody is writing; so does a single one that is
# submitted again, as with --array=3.
#SBATCH --job-name=prepare
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
source slurm/common.sh || { echo "submit this from the repository's folder, or with sbatch --chdir=IT" >&2; exit 2; }
[[ ${1:-} == *.yaml ]] || set -- configs/mixar_l.yaml "$@"
run python -u -m mixar prepare "$@"
