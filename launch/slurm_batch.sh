#!/usr/bin/env bash
# Answers a file of requests with a SLURM array of `vl3 batch`, one GPU and one shard a task; preempted tasks are requeued
# and go on where they were.
#
#   launch/slurm_batch.sh --tasks 32 --python ENV/bin/python -- \
#       --model DIR --in /shared/requests.jsonl --out /shared/answers.jsonl
#
#   --tasks N        number of tasks, each of which answers a part of the requests (1)
#   --parallel P     tasks at a time (all)
#   --time T         time limit of a task
#   --name NAME      name of the job (vl3-batch)
#   --python FILE    Python with this package and its extra "cuda", on every host (python3)
#   --sbatch FLAG    additional flag for sbatch, such as --partition=gpu; may be repeated
#   --dry-run        print the commands without running them
#
# The files must be in folders that all hosts share. Requests are divided by what they are, so another number of tasks
# goes on where earlier ones were stopped. The task that ends last merges the answers.
# exit codes: those of sbatch; of a task those of `vl3 batch`.
set -euo pipefail

fail() {
  echo "slurm_batch.sh: $1" >&2
  exit 2
}

# Prints a command in a form that can be typed, and runs it unless this is a dry run.
run_command() {
  printf '%q ' "$@" | sed 's/ $//'
  echo
  [[ -n "$dry" ]] || "$@"
}

tasks=1 parallel='' time='' name=vl3-batch python=python3 dry='' inside='' sbatch_flags=() job=()
while (($#)); do
  case "$1" in
    --dry-run) dry=1 ;;
    --inside) inside=1 ;; # this is the batch script itself
    --)
      shift
      job=("$@")
      break
      ;;
    --tasks | --parallel | --time | --name | --python | --sbatch)
      (($# > 1)) || fail "$1 needs a value"
      case "$1" in
        --tasks) tasks=$2 ;;
        --parallel) parallel=$2 ;;
        --time) time=$2 ;;
        --name) name=$2 ;;
        --python) python=$2 ;;
        --sbatch) sbatch_flags+=("$2") ;;
      esac
      shift
      ;;
    *) fail "$1: unknown flag; the first lines of this file list the flags" ;;
  esac
  shift
done
[[ " ${job[*]:-}" == *" --in"* && " ${job[*]:-}" == *" --out"* ]] ||
  fail "give the arguments of \`vl3 batch\` after --, with --in and --out among them"
[[ " ${job[*]}" != *" --shard"* ]] || fail "--shard is that of each task; give their number as --tasks"
for number in "$tasks" "${parallel:-1}"; do
  [[ "$number" =~ ^[1-9][0-9]*$ ]] || fail "$number: give a number of at least 1"
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z "$inside" ]]; then
  # SLURM runs a copy of this file from a folder of its own, so the task changes to the repository.
  run_command sbatch --job-name "$name" --array "1-$tasks${parallel:+%$parallel}" --ntasks 1 --gpus 1 --requeue \
    --open-mode append --output "$name-%A-%a.log" --chdir "$root" ${time:+--time "$time"} "${sbatch_flags[@]}" \
    "$root/launch/slurm_batch.sh" --inside --tasks "$tasks" --python "$python" -- "${job[@]}"
  exit
fi

export PYTHONUNBUFFERED=1
run_command srun --ntasks 1 "$python" -m vl3_jax batch "${job[@]}" --shard "${SLURM_ARRAY_TASK_ID:?}/$tasks"
