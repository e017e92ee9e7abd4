# Shared by the job scripts: a step over the whole job, and the end or the requeueing of the job after that step.
# shellcheck shell=bash

source slurm/site.sh

# Run a command with one task per GPU, or --ntasks-per-node, on every node; then end the job or requeue it.
#
# This depends on the word that the command writes to the file MIXAR_OUTCOME. The exit status is not sufficient, since
# srun returns that of the tasks it killed. `done` and `refused`, for a mistake of the user, end the job. `stopped`,
# after a signal, and a failure without a word requeue it, and the same command resumes. So does `failed IMAGES`, after
# an unexpected error, until it occurs three times without a new checkpoint.
run() {
  local tasks=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} restarts=${SLURM_RESTART_COUNT:-0} status=0 word
  local cpus=$((SLURM_CPUS_ON_NODE / tasks))
  export MIXAR_OUTCOME=$PWD/.outcome-$SLURM_JOB_ID OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
  rm -f "$MIXAR_OUTCOME"
  echo "== $(date -Is) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $tasks tasks per node, restart $restarts: $*"
  # a lost task ends all, since the others would wait for it in a collective
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$tasks" --cpus-per-task="$cpus" --export=ALL \
    --kill-on-bad-exit=1 --wait=60 "${CONTAINER[@]}" "$@" || status=$?
  word=$(cat "$MIXAR_OUTCOME" 2>/dev/null)
  rm -f "$MIXAR_OUTCOME"
  echo "== $(date -Is) ${word:-no outcome}, status $status"
  case $word:$status in
    done:* | :0) rm -f "$MIXAR_OUTCOME.failures" && exit 0 ;;
    failed*)
      echo "$word" >>"$MIXAR_OUTCOME.failures"
      (($(grep -cx "$word" "$MIXAR_OUTCOME.failures") < 3)) || give_up 1 "it fails each time, see the message above"
      ;;
    refused:* | :2) give_up 2 "the message above says what to change" ;;
  esac
  ((restarts < MAX_RESTARTS)) || give_up 1 "this was restart $restarts of MAX_RESTARTS=$MAX_RESTARTS"
  scontrol requeue "$SLURM_JOB_ID" || give_up 1 "submit the same command again, and it resumes where it stopped"
  exit 0
}

give_up() {
  echo "$SLURM_JOB_NAME: not requeued: $2" >&2
  exit "$1"
}
