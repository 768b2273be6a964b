#!/usr/bin/env bash
# Runs `vl3 train` on Cloud TPU VMs, through queued resources and gcloud.
#
#   launch/tpu_vm.sh watch --name NAME --zone ZONE --topology v5e:8x8 --spot -- --config CONFIG --workdir gs://...
#
# does all steps: it requests the slice, installs this repository on all hosts, starts the job, repeats this after a
# preemption until the job is done, and then deletes the slice. The single steps:
#
#   create    request the slice (it waits in a queue)          status    print the state of the slice and of the job
#   install   install this repository on all hosts             logs      follow the log of the first host
#   run       start the job, which outlives the connection     stop      save a checkpoint and stop the job
#   delete    delete the slice and the request for it
#
# Flags, before `--`:
#   --name NAME          name of the request and of its machines
#   --zone ZONE          zone, such as us-west4-a
#   --project PROJECT    project (default: that of gcloud)
#   --topology T         slice as in `vl3 plan`: v5e:8x8, v5p:4x4x4, v5litepod-64, v5p-128, v6e-64
#   --node-count N       number of slices (1)
#   --spot               use spot machines, which are cheaper and can be preempted
#   --runtime VERSION    software version of the machines (default: depends on the chip)
#   --create-flag FLAG   additional flag for `gcloud compute tpus queued-resources create`; may be repeated
#   --restarts K         restarts of a failed job on its machines (20)
#   --hang-seconds S     restart the job after S seconds without a metrics report (1800)
#   --poll S             seconds between two checks of `watch` (60)
#   --xla-flags          set the compiler flags for this chip (vl3_jax/parallel/xla_flags.py)
#   --keep               do not delete the slice at the end of `watch`
#   --dry-run            print the commands without running them
#
# exit codes: 0 done; 1 failed; 2 bad input; `watch` returns the exit code of the job.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' zone='' project='' topology='' nodes=1 spot='' runtime='' restarts=20 hang=1800 poll=60 keep='' dry='' xla=''
create_flags=() job=()

fail() {
  echo "tpu_vm.sh: $1" >&2
  exit 2
}

# Prints a command in a form that can be typed, and runs it unless this is a dry run.
run_command() {
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
      *) fail "$1: unknown flag; the first lines of this file list the flags" ;;
    esac
    shift
  done
}

# Sets kind (the type of the chip), chips (their number) and accelerator (flags of gcloud) from the name of a topology.
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
  # --accelerator-type selects a default shape; other shapes must be requested by --topology.
  if [[ "$topology" == *:* ]]; then
    case "$chips" in
      1) default=1x1 ;; 4) default='2x2 2x2x1' ;; 8) default='2x4 2x2x2' ;; 16) default='4x4 2x2x4' ;;
      32) default='4x8 2x4x4' ;; 64) default='8x8 4x4x4' ;; 128) default='8x16 4x4x8' ;;
      256) default='16x16 4x8x8' ;; 512) default=8x8x8 ;; *) default= ;;
    esac
    [[ " $default " == *" ${topology#*:} "* ]] || case "$kind" in
      v4 | v5p) accelerator=(--type "$kind" --topology "${topology#*:}") ;;
      *) fail "topology $topology: $kind slices are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 and 16x16" ;;
    esac
  fi
}

resource() {
  local verb=$1
  shift
  run_command gcloud compute tpus queued-resources "$verb" "$@" "${where[@]}"
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
  local parts=(LICENSE README.md pyproject.toml requirements.txt setup.py vl3_jax data_pipelines configs launch)
  local packed="${TMPDIR:-/tmp}/vl3_jax-$name.tgz"
  run_command tar -C "$root" --exclude __pycache__ -czf "$packed" "${parts[@]}"
  resource scp "$packed" "$name:vl3_jax.tgz" --node all --worker all
  on_all 'rm -rf vl3_jax && mkdir vl3_jax && tar -C vl3_jax -xzf vl3_jax.tgz && bash vl3_jax/launch/worker.sh install'
}

run() {
  local flags=(--restarts "$restarts" --hang-seconds "$hang") expect=()
  ((${#job[@]})) || fail "give the arguments of \`vl3 train\` after --"
  [[ " ${job[*]}" == *" --workdir"*gs://* ]] || fail "--workdir must be gs://..., shared by all hosts"
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

# Prints the state of the request: "none" if it does not exist, "unknown" if the cloud does not answer.
state() {
  local output
  if output=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format 'value(state.state)' 2>&1); then
    echo "${output##*$'\n'}"
  elif [[ "$output" == *NOT_FOUND* ]]; then
    echo none
  else
    echo "tpu_vm.sh: $output" >&2
    echo unknown
  fi
}

watch() {
  local now job_now
  read_topology
  if [[ -n "$dry" ]]; then
    echo "# every $poll s; if there is no slice:" && create
    echo "# if it was preempted, or the request failed:" && delete && create
    echo "# if it is ready and the job does not run:" && install && run
    [[ -n "$keep" ]] || { echo "# when the job is done, or after bad input:" && delete; }
    return
  fi
  while true; do
    now=$(state)
    job_now=''
    if [[ "$now" == ACTIVE ]]; then
      # A slice that is being preempted does not answer; the next check finds its state.
      job_now=$(gcloud compute tpus queued-resources ssh "$name" --node 0 --worker 0 "${where[@]}" \
        --command 'bash vl3_jax/launch/worker.sh status 2>/dev/null || echo not running' 2>/dev/null | tail -n 1) ||
        job_now='no answer'
    fi
    echo "$(date -u +%FT%TZ) slice $now${job_now:+, job $job_now}"
    case "$now:$job_now" in
      none:) create || echo "tpu_vm.sh: not created; retrying" >&2 ;;
      FAILED:* | SUSPENDED:*) if delete; then create; fi || echo "tpu_vm.sh: not created; retrying" >&2 ;;
      "ACTIVE:not running" | "ACTIVE:exit 75") { install && run; } || echo "tpu_vm.sh: not started; retrying" >&2 ;;
      "ACTIVE:exit "*)
        [[ -n "$keep" || "$job_now" == "exit 1" ]] || delete # a failed job keeps its slice for its logs
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
  *) fail "give create, install, run, logs, status, stop, delete or watch; see the first lines of this file" ;;
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
