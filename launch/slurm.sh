#!/usr/bin/env bash
# Runs `vl3 train` on GPU hosts under SLURM, one process on each host; resumes after a preemption or the time limit.
#
#   launch/slurm.sh --nodes 4 --gpus-per-node 8 --time 24:00:00 --python ENV/bin/python -- --config CONFIG --workdir DIR
#
#   --nodes N            number of hosts (1)
#   --gpus-per-node G    GPUs of each host (8)
#   --time T             time limit of one allocation, after which the job is requeued
#   --name NAME          name of the job (vl3)
#   --python FILE        Python with this package and its extra "cuda", on every host (python3)
#   --restarts K         restarts of a failed job inside an allocation (3)
#   --hang-seconds S     restart the job after S seconds without a metrics report (1800)
#   --grace-seconds S    time to save a checkpoint before an allocation ends (300)
#   --xla-flags          set the compiler flags for GPUs (vl3_jax/parallel/xla_flags.py)
#   --sbatch FLAG        additional flag for sbatch, such as --partition=gpu; may be repeated
#   --dry-run            print the commands without running them
#
# The workdir must be a folder that all hosts share, or gs://.
# exit codes: those of sbatch; of the job 0 done, 1 failed, 2 bad input, 75 requeued.
set -euo pipefail

fail() {
  echo "slurm.sh: $1" >&2
  exit 2
}

# Prints a command in a form that can be typed, and runs it unless this is a dry run.
run_command() {
  printf '%q ' "$@" | sed 's/ $//'
  echo
  [[ -n "$dry" ]] || "$@"
}

nodes=1 gpus=8 time='' name=vl3 python=python3 restarts=3 hang=1800 grace=300 dry='' inside='' xla=() sbatch_flags=() job=()
while (($#)); do
  case "$1" in
    --dry-run) dry=1 ;;
    --inside) inside=1 ;; # this is the batch script itself
    --xla-flags) xla=(--xla-flags) ;;
    --)
      shift
      job=("$@")
      break
      ;;
    --nodes | --gpus-per-node | --time | --name | --python | --restarts | --hang-seconds | --grace-seconds | \
      --sbatch)
      (($# > 1)) || fail "$1 needs a value"
      case "$1" in
        --nodes) nodes=$2 ;;
        --gpus-per-node) gpus=$2 ;;
        --time) time=$2 ;;
        --name) name=$2 ;;
        --python) python=$2 ;;
        --restarts) restarts=$2 ;;
        --hang-seconds) hang=$2 ;;
        --grace-seconds) grace=$2 ;;
        --sbatch) sbatch_flags+=("$2") ;;
      esac
      shift
      ;;
    *) fail "$1: unknown flag; the first lines of this file list the flags" ;;
  esac
  shift
done
[[ " ${job[*]:-}" == *" --workdir"* ]] || fail "give the arguments of \`vl3 train\` after --, with --workdir among them"
for number in "$nodes" "$gpus" "$restarts" "$hang" "$grace"; do
  [[ "$number" =~ ^[0-9]+$ ]] || fail "$number: give a number"
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
launch_flags=(--nodes "$nodes" --gpus-per-node "$gpus" --python "$python" --restarts "$restarts" --hang-seconds "$hang"
  --grace-seconds "$grace" "${xla[@]}")
if [[ -z "$inside" ]]; then
  # SLURM runs a copy of this file from a folder of its own, so the job changes to the repository.
  run_command sbatch --job-name "$name" --nodes "$nodes" --ntasks-per-node 1 --gpus-per-node "$gpus" --exclusive \
    --requeue --open-mode append --output "$name-%j.log" --chdir "$root" --signal "B:TERM@$((grace + 60))" \
    ${time:+--time "$time"} "${sbatch_flags[@]}" "$root/launch/slurm.sh" --inside "${launch_flags[@]}" -- "${job[@]}"
  exit
fi

# Under SLURM, JAX uses one GPU per process unless the local devices are set.
JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((gpus - 1)))
export JAX_LOCAL_DEVICE_IDS PYTHONUNBUFFERED=1
[[ "${job[*]}" == *expect_devices* ]] || job+=("--config.expect_devices=$((nodes * gpus))")
command=(srun --nodes "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=0 "$python" launch/local.py
  --restarts "$restarts" --hang-seconds "$hang" --grace-seconds "$grace" "${xla[@]/%/=gpu}" -- "${job[@]}")
if [[ -n "$dry" ]]; then
  run_command "${command[@]}"
  exit
fi

"${command[@]}" &
srun=$!
# Before an allocation ends, SLURM signals only this shell; srun forwards the signal to all hosts.
trap 'kill -TERM "$srun"' TERM
code=0
while true; do
  code=0
  wait "$srun" || code=$?
  kill -0 "$srun" 2>/dev/null || break
done
if ((code == 75)); then
  echo "slurm.sh: stopped before the end; requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
