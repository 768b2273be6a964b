#!/usr/bin/env bash
# Runs a job on one host of a TPU slice; tpu_vm.sh copies this repository to ~/vl3_jax and calls this file over ssh.
#
#   worker.sh install                                    install this package into a Python environment in ~/vl3_env
#   worker.sh start [flags of local.py] -- [arguments of vl3 train]
#   worker.sh stop | status | logs [lines]
set -euo pipefail

unit=vl3-train
code="$HOME/vl3.exit" # holds the exit code of the job once it has ended
log="$HOME/vl3.log"

install() {
  # The images of TPU VMs have an older Python than this package needs.
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [[ -x "$HOME/vl3_env/bin/python" ]] || uv venv --quiet --python 3.12 "$HOME/vl3_env"
  uv pip install --quiet --python "$HOME/vl3_env/bin/python" "$HOME/vl3_jax[tpu,gcs]"
}

# A systemd unit outlives the ssh connection and is stopped with the machine: SIGTERM, then time to save a checkpoint.
start() {
  stop
  rm -f "$code"
  # shellcheck disable=SC2016 # expanded by the inner shell
  sudo systemd-run --quiet --unit "$unit" --uid "$(id -u)" --gid "$(id -g)" \
    --property "WorkingDirectory=$HOME/vl3_jax" --property KillMode=mixed --property TimeoutStopSec=660 \
    --property "StandardOutput=append:$log" --property "StandardError=append:$log" --setenv "HOME=$HOME" \
    bash -c 'trap "stopped=1; [[ -z \${job-} ]] || kill -TERM \$job" TERM
      "$@" & job=$!
      [[ -z ${stopped-} ]] || kill -TERM $job # the signal came before there was a job
      while wait $job; code=$?; kill -0 $job 2>/dev/null; do :; done
      wait $job; again=$?; ((again == 127)) || code=$again # a signal may have ended the wait just before the job did
      [[ -z ${stopped-} ]] || ((code != 143)) || code=75   # stopped before it could tell
      echo "$code" >"$HOME/vl3.exit"
      exit "$code"' \
    worker "$HOME/vl3_env/bin/python" launch/local.py "$@"
}

stop() {
  sudo systemctl stop "$unit" 2>/dev/null || true
  sudo systemctl reset-failed "$unit" 2>/dev/null || true
}

status() {
  if systemctl is-active --quiet "$unit"; then
    echo running
  elif [[ -s "$code" ]]; then
    echo "exit $(<"$code")"
  else
    echo "not running"
  fi
}

logs() {
  tail -n "${1:-1000}" -F "$log"
}

command=${1:-}
shift || true
case "$command" in
  install | start | stop | status | logs) "$command" "$@" ;;
  *)
    echo "worker.sh: install, start, stop, status or logs" >&2
    exit 2
    ;;
esac
