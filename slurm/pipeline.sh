#!/usr/bin/env bash
# Submit prepare, train and evaluate, each to start after the success of the previous one. Prints the job ids.
#
#   slurm/pipeline.sh b|l|h [CONFIG] [key=value ...] -- EVALUATE_ARGUMENT ...
#   slurm/pipeline.sh l data.images=/data/imagenet/train -- --reference /data/imagenet/train --crop 256
#
# sbatch options are set in the environment: for all jobs as SBATCH_PARTITION, SBATCH_ACCOUNT, ..., for a single one as
# PREPARE_OPTIONS, TRAIN_OPTIONS, EVALUATE_OPTIONS, such as TRAIN_OPTIONS="--nodes=4 --time=2-00:00:00".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/site.sh

case ${1:-} in
  b | l | h) size=$1 && shift ;;
  *) echo "pipeline.sh: '${1:-}' is not a size: write slurm/pipeline.sh l [CONFIG] [key=value ...] -- ..." >&2 && exit 2 ;;
esac
[[ ${1:-} == *.yaml ]] || set -- "configs/mixar_$size.yaml" "$@"
arguments=() config=() # the latter without flags, which are for prepare and train
while (($#)) && [ "$1" != -- ]; do
  arguments+=("$1")
  [[ $1 == -* ]] || config+=("$1")
  shift
done
(($# > 1)) || { echo "pipeline.sh: no arguments for evaluate: write ... -- --reference IMAGES" >&2 && exit 2; }
shift # the --
# report a mistake in the config before anything is submitted
run_dir=$("${CONTAINER[@]}" python -m mixar plan "${config[@]}" --print run_dir)

# Submit a script, to start after the job of a given id.
submit() {
  local after=$1 options
  read -ra options <<<"$2"
  sbatch --parsable ${after:+--dependency="afterok:$after" --kill-on-invalid-dep=yes} "${options[@]}" "${@:3}" |
    cut -d ';' -f 1 # the cluster's name may follow
}
prepare=$(submit "" "${PREPARE_OPTIONS:-}" slurm/prepare.sh "${arguments[@]}")
train=$(submit "$prepare" "${TRAIN_OPTIONS:-}" "slurm/train_$size.sh" "${arguments[@]}")
evaluate=$(submit "$train" "${EVALUATE_OPTIONS:-}" slurm/evaluate.sh "$run_dir" "$@")
echo "prepare $prepare, train $train, evaluate $evaluate"
