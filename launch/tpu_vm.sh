#!/usr/bin/env bash
# `vl3 train` on Cloud TPU machines, through queued resources and gcloud.
#
#   launch/tpu_vm.sh watch --name NAME --zone ZONE --topology v5e:8x8 --spot -- --config FILE --workdir gs://...
#
# does all there is to do: asks for the slice, installs this repository on all hosts, starts the job, and after a
# preemption does so again, until the job is done; then the slice is deleted. The single steps:
#
#   create    ask for the slice (it waits in a queue)       status    of the slice and the job
#   install   this repository, on all hosts                 logs      of the first host, followed
#   run       start the job, which outlives the connection  stop      the job saves and ends
#   delete    the slice and the request for it
#
# Flags, before `--`:
#   --name NAME          of the request and its machines
#   --zone ZONE          such as us-west4-a
#   --project PROJECT    that of gcloud unless given
#   --topology T         v5e:8x8, v5p:4x4x4, v5litepod-64, v5p-128, v6e-64: as in `vl3 plan`
#   --node-count N       slices of a multi-slice job (1)
#   --spot               cheaper machines that may be taken away
#   --runtime VERSION    of the machines' image; that of the chip unless given
#   --create-flag FLAG   one more for `gcloud compute tpus queued-resources create`; may be repeated
#   --restarts K         of the job on its machines, when it fails (20)
#   --hang-seconds S     without a report, after which the job counts as dead (1800)
#   --poll S             seconds between two looks of `watch` (60)
#   --xla-flags          the compiler's flags for this chip (vl3_jax/parallel/xla_flags.py)
#   --keep               `watch` does not delete the slice at the end
#   --dry-run            print what would be run
#
# exit codes: 0 done; 1 failed; 2 bad input; of `watch`, those of the job.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' zone='' project='' topology='' nodes=1 spot='' runtime='' restarts=20 hang=1800 poll=60 keep='' dry='' xla=''
create_flags=() job=()

fail() {
  echo "tpu_vm.sh: $1" >&2
  exit 2
}

# Prints a command as one could type it, and runs it unless this is a dry run.
do_it() {
  printf '%q ' "$@" | sed 's/ $//'
  echo
  [[ -n "$dry" ]] || "$@"
}

read_arguments() {
  while (($#)); do
    case "$1" in
      --spot) spot=1 ;;
      --keep) keep=1 ;;
      --xla-flags) xla=1 ;;
      --dry-run) dry=1 ;;
      --)
        shift
        job=("$@")
        return
        ;;
      --name | --zone | --project | --topology | --node-count | --runtime | --create-flag | --restarts | \
        --hang-seconds | --poll)
        (($# > 1)) || fail "$1 needs a value"
        case "$1" in
          --name) name=$2 ;;
          --zone) zone=$2 ;;
          --project) project=$2 ;;
          --topology) topology=$2 ;;
          --node-count) nodes=$2 ;;
          --runtime) runtime=$2 ;;
          --create-flag) create_flags+=("$2") ;;
          --restarts) restarts=$2 ;;
          --hang-seconds) hang=$2 ;;
          --poll) poll=$2 ;;
        esac
        shift
        ;;
      *) fail "$1: no such flag; the first lines of this file list them" ;;
    esac
    shift
  done
}

# Sets kind (as the cloud calls the chip), chips and accelerator (flags) from the name of a topology.
read_topology() {
  local default
  [[ -n "$topology" ]] || fail "give --topology, such as v5e:8x8 or v5p-128"
  if [[ "$topology" =~ ^(v4|v5p|v5e|v6e):([0-9]+)x([0-9]+)(x([0-9]+))?$ ]]; then
    kind=${BASH_REMATCH[1]}
    chips=$((BASH_REMATCH[2] * BASH_REMATCH[3] * ${BASH_REMATCH[5]:-1}))
    case "$kind${BASH_REMATCH[5]:+:3}" in v5e | v6e | v4:3 | v5p:3) ;; *) fail "topology $topology: 2 dimensions for v5e and v6e, 3 for v4 and v5p" ;; esac
  elif [[ "$topology" =~ ^(v4|v5p|v5litepod|v5lite|v5e|v6e)-([0-9]+)$ ]]; then
    kind=${BASH_REMATCH[1]}
    chips=${BASH_REMATCH[2]}
    case "$kind" in v4 | v5p) chips=$((chips / 2)) ;; v5litepod | v5lite) kind=v5e ;; esac
  else
    fail "topology $topology: give one like v5e:8x8, v5litepod-64, v5p-128 or v6e-64"
  fi
  case "$kind" in
    v4) runtime=${runtime:-tpu-ubuntu2204-base} accelerator=(--accelerator-type "v4-$((chips * 2))") ;;
    v5p) runtime=${runtime:-v2-alpha-tpuv5} accelerator=(--accelerator-type "v5p-$((chips * 2))") ;;
    v5e) runtime=${runtime:-v2-alpha-tpuv5-lite} accelerator=(--accelerator-type "v5litepod-$chips") ;;
    v6e) runtime=${runtime:-v2-alpha-tpuv6e} accelerator=(--accelerator-type "v6e-$chips") ;;
  esac
  # A shape that the cloud would not choose by itself for so many chips is asked for as such.
  if [[ "$topology" == *:* ]]; then
    case "$chips" in
      1) default=1x1 ;; 4) default='2x2 2x2x1' ;; 8) default='2x4 2x2x2' ;; 16) default='4x4 2x2x4' ;;
      32) default='4x8 2x4x4' ;; 64) default='8x8 4x4x4' ;; 128) default='8x16 4x4x8' ;;
      256) default='16x16 4x8x8' ;; 512) default=8x8x8 ;; *) default= ;;
    esac
    [[ " $default " == *" ${topology#*:} "* ]] || case "$kind" in
      v4 | v5p) accelerator=(--type "$kind" --topology "${topology#*:}") ;;
      *) fail "topology $topology: $kind comes in 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 and 16x16" ;;
    esac
  fi
}

resource() {
  local verb=$1
  shift
  do_it gcloud compute tpus queued-resources "$verb" "$@" "${where[@]}"
}

on_all() {
  resource ssh "$name" --node all --worker all --command "$1"
}

on_first() {
  resource ssh "$name" --node 0 --worker 0 --command "$1"
}

create() {
  read_topology
  local wanted=(--node-id "$name")
  ((nodes == 1)) || wanted=(--node-count "$nodes" --node-prefix "$name")
  resource create "$name" "${accelerator[@]}" --runtime-version "$runtime" "${wanted[@]}" ${spot:+--spot} \
    "${create_flags[@]}"
}

install() {
  local parts=(README.md pyproject.toml requirements.txt setup.py vl3_jax data_pipelines configs launch)
  local packed="${TMPDIR:-/tmp}/vl3_jax-$name.tgz"
  do_it tar -C "$root" --exclude __pycache__ -czf "$packed" "${parts[@]}"
  resource scp "$packed" "$name:vl3_jax.tgz" --node all --worker all
  on_all 'rm -rf vl3_jax && mkdir vl3_jax && tar -C vl3_jax -xzf vl3_jax.tgz && bash vl3_jax/launch/worker.sh install'
}

run() {
  local flags=(--restarts "$restarts" --hang-seconds "$hang") expect=()
  ((${#job[@]})) || fail "give the arguments of \`vl3 train\` after --"
  [[ " ${job[*]}" == *" --workdir"*gs://* ]] || fail "--workdir must be gs://..., which all hosts share"
  if [[ -n "$topology" && "${job[*]}" != *expect_devices* ]]; then
    read_topology
    expect=("--config.expect_devices=$((chips * nodes))")
  fi
  if [[ -n "$xla" ]]; then
    read_topology
    flags+=(--xla-flags "$kind" --slices "$nodes")
  fi
  on_all "bash vl3_jax/launch/worker.sh start$(printf ' %q' "${flags[@]}" -- "${job[@]}" "${expect[@]}")"
}

status() {
  resource describe "$name" --format 'value(state.state)'
  on_first 'bash vl3_jax/launch/worker.sh status'
}

logs() {
  on_first 'bash vl3_jax/launch/worker.sh logs'
}

stop() {
  on_all 'bash vl3_jax/launch/worker.sh stop'
}

delete() {
  resource delete "$name" --force --quiet
}

# The state of the request; "none" where there is no such, "unknown" where the cloud cannot be asked now.
state() {
  local answer
  if answer=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format 'value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ "$answer" == *NOT_FOUND* ]]; then
    echo none
  else
    echo "tpu_vm.sh: $answer" >&2
    echo unknown
  fi
}

watch() {
  local now job_now
  read_topology
  if [[ -n "$dry" ]]; then
    echo "# every $poll s; where there is no slice:" && create
    echo "# where it was preempted, or the request failed:" && delete && create
    echo "# where it is there and the job does not run:" && install && run
    [[ -n "$keep" ]] || { echo "# when the job is done, or its input is bad:" && delete; }
    return
  fi
  while true; do
    now=$(state)
    job_now=''
    if [[ "$now" == ACTIVE ]]; then
      # A slice that is just being taken away does not answer; the next look tells.
      job_now=$(gcloud compute tpus queued-resources ssh "$name" --node 0 --worker 0 "${where[@]}" \
        --command 'bash vl3_jax/launch/worker.sh status 2>/dev/null || echo not running' 2>/dev/null | tail -n 1) ||
        job_now='no answer'
    fi
    echo "$(date -u +%FT%TZ) slice $now${job_now:+, job $job_now}"
    case "$now:$job_now" in
      none:) create || echo "tpu_vm.sh: not created; tried again" >&2 ;;
      FAILED:* | SUSPENDED:*) if delete; then create; fi || echo "tpu_vm.sh: not created; tried again" >&2 ;;
      "ACTIVE:not running" | "ACTIVE:exit 75") { install && run; } || echo "tpu_vm.sh: not started; tried again" >&2 ;;
      "ACTIVE:exit "*)
        [[ -n "$keep" || "$job_now" == "exit 1" ]] || delete # after a failure the logs are still wanted
        return "${job_now#exit }"
        ;;
    esac
    sleep "$poll"
  done
}

verb=${1:-}
shift || true
case "$verb" in
  create | install | run | logs | status | stop | delete | watch) ;;
  *) fail "create, install, run, logs, status, stop, delete or watch; the first lines of this file tell more" ;;
esac
read_arguments "$@"
[[ -n "$name" ]] || fail "give --name"
[[ -n "$zone" ]] || fail "give --zone"
for number in "$nodes" "$restarts" "$hang" "$poll"; do
  [[ "$number" =~ ^[0-9]+$ ]] || fail "$number: give a number"
done
where=(--zone "$zone")
[[ -z "$project" ]] || where+=(--project "$project")
"$verb"
