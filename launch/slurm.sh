#!/usr/bin/env bash
# `vl3 train` on GPU hosts under SLURM, one process a host; goes on by itself after a preemption or the time limit.
#
#   launch/slurm.sh --nodes 4 --gpus-per-node 8 --time 24:00:00 --python ENV/bin/python -- --config FILE --workdir DIR
#
#   --nodes N            hosts (1)
#   --gpus-per-node G    GPUs of each (8)
#   --time T             of one allocation; the job is queued again when it is over
#   --name NAME          of the job (vl3)
#   --python FILE        a Python with this package and its extra "cuda", on every host (python3)
#   --restarts K         of the job inside an allocation, when it fails (3)
#   --hang-seconds S     without a report, after which the job counts as dead (1800)
#   --grace-seconds S    to save before an allocation ends (300)
#   --xla-flags          the compiler's flags for GPUs (vl3_jax/parallel/xla_flags.py)
#   --sbatch FLAG        one more for sbatch, such as --partition=gpu; may be repeated
#   --dry-run            print what would be run
#
# The workdir is a folder that all hosts share, or gs://.
# exit codes: of sbatch; the job's own are 0 done, 1 failed, 2 bad input, 75 queued again.
set -euo pipefail

fail() {
  echo "slurm.sh: $1" >&2
  exit 2
}

do_it() {
  printf '%q ' "$@" | sed 's/ $//'
  echo
  [[ -n "$dry" ]] || "$@"
}

nodes=1 gpus=8 time='' name=vl3 python=python3 restarts=3 hang=1800 grace=300 dry='' inside='' xla=() sbatch_flags=() job=()
while (($#)); do
  case "$1" in
    --dry-run) dry=1 ;;
    --inside) inside=1 ;; # the batch script itself
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
    *) fail "$1: no such flag; the first lines of this file list them" ;;
  esac
  shift
done
[[ " ${job[*]:-}" == *" --workdir"* ]] || fail "give the arguments of \`vl3 train\` after --, with --workdir among them"
for number in "$nodes" "$gpus" "$restarts" "$hang" "$grace"; do
  [[ "$number" =~ ^[0-9]+$ ]] || fail "$number: give a number"
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
own=(--nodes "$nodes" --gpus-per-node "$gpus" --python "$python" --restarts "$restarts" --hang-seconds "$hang"
  --grace-seconds "$grace" "${xla[@]}")
if [[ -z "$inside" ]]; then
  # Inside, this file is a copy in SLURM's own folder, so the job begins in the repository.
  do_it sbatch --job-name "$name" --nodes "$nodes" --ntasks-per-node 1 --gpus-per-node "$gpus" --exclusive \
    --requeue --open-mode append --output "$name-%j.log" --chdir "$root" --signal "B:TERM@$((grace + 60))" \
    ${time:+--time "$time"} "${sbatch_flags[@]}" "$root/launch/slurm.sh" --inside "${own[@]}" -- "${job[@]}"
  exit
fi

# JAX takes one GPU a process under SLURM unless it is told which.
JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((gpus - 1)))
export JAX_LOCAL_DEVICE_IDS PYTHONUNBUFFERED=1
[[ "${job[*]}" == *expect_devices* ]] || job+=("--config.expect_devices=$((nodes * gpus))")
command=(srun --nodes "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=0 "$python" launch/local.py
  --restarts "$restarts" --hang-seconds "$hang" --grace-seconds "$grace" "${xla[@]/%/=gpu}" -- "${job[@]}")
if [[ -n "$dry" ]]; then
  do_it "${command[@]}"
  exit
fi

"${command[@]}" &
srun=$!
# Before the end of an allocation SLURM tells this shell alone; srun passes the signal on to all hosts.
trap 'kill -TERM "$srun"' TERM
code=0
while true; do
  code=0
  wait "$srun" || code=$?
  kill -0 "$srun" 2>/dev/null || break
done
if ((code == 75)); then
  echo "slurm.sh: stopped before the end; queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
