"""Bulk answers on many machines: the indexed job of GKE, the SLURM array, and what each machine runs."""

import os
import subprocess

import pytest
import yaml
from launched_scripts import LAUNCH, ROOT, launched

FILES = ("--model", "/files/model", "--in", "/files/my requests.jsonl", "--out", "/files/answers.jsonl")
JOB = ("--name", "captions", "--image", "registry/vl3", "--claim", "files", "--shards", "32")
# Prints its arguments instead of answering.
ECHO = '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n'


def rendered(*flags):
    result = launched("gke/render_batch.py", *JOB, *flags, "--", *FILES)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def programs(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_text(ECHO)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("flags", "labels", "resource"),
    [
        (
            ("--accelerator", "v6e"),
            {"cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice", "cloud.google.com/gke-tpu-topology": "1x1"},
            "google.com/tpu",
        ),
        (
            ("--accelerator", "nvidia-l4", "--spot"),
            {"cloud.google.com/gke-accelerator": "nvidia-l4", "cloud.google.com/gke-spot": "true"},
            "nvidia.com/gpu",
        ),
    ],
)
def test_manifests_are_valid_and_request_one_accelerator(flags, labels, resource):
    job = rendered(*flags, "--service-account", "reader")
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == labels
    assert pod["containers"][0]["resources"]["limits"] == {resource: 1}
    assert ("tolerations" in pod) == ("--spot" in flags)
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 32
    validate = pytest.importorskip("kubernetes_validate", reason="needs pip install -e '.[test]'")
    validate.validate(job, validate.latest_version(), strict=True)


def test_each_index_answers_its_shard(tmp_path):
    container = rendered("--accelerator", "v5e", "--parallelism", "4")["spec"]["template"]["spec"]["containers"][0]
    environment = os.environ | programs(tmp_path / "bin", "vl3") | {"JOB_COMPLETION_INDEX": "4"}
    command = [*container["command"], *container["args"]]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["batch", *FILES, "--shard", "5/32"]


def test_bad_input_ends_an_index_and_a_lost_machine_does_not():
    spec = rendered("--accelerator", "v5e")["spec"]
    assert (spec["completionMode"], spec["backoffLimitPerIndex"]) == ("Indexed", 20)
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["Ignore", "FailIndex"]
    assert spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [2]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # required by a policy for exit codes


@pytest.mark.parametrize(
    ("flags", "batch", "text"),
    [
        (("--name", "My_Job"), FILES, "--name My_Job"),
        (("--shards", "0"), FILES, "--shards"),
        ((), (*FILES, "--shard", "1/2"), "--shard is"),
        ((), (*FILES[:-2], "--out=/tmp/answers.jsonl"), "--out /tmp/answers.jsonl: give a file under /files"),
        ((), FILES[:2], "--in"),
    ],
)
def test_bad_input_of_the_manifest_is_refused(flags, batch, text):
    result = launched("gke/render_batch.py", *JOB, "--accelerator", "v5e", *flags, "--", *batch)
    assert result.returncode == 2
    assert text in result.stderr.splitlines()[-1]


def test_slurm_dry_run():
    flags = ("--dry-run", "--tasks", "16", "--parallel", "4", "--time", "2:00:00", "--sbatch", "--partition=gpu")
    result = launched("slurm_batch.sh", *flags, "--python", "/env/bin/python", "--", *FILES)
    files = r"--model /files/model --in /files/my\ requests.jsonl --out /files/answers.jsonl"
    assert result.stdout.splitlines() == [
        r"sbatch --job-name vl3-batch --array 1-16%4 --ntasks 1 --gpus 1 --requeue --open-mode append --output "
        rf"vl3-batch-%A-%a.log --chdir {ROOT} --time 2:00:00 --partition=gpu {LAUNCH}/slurm_batch.sh --inside "
        rf"--tasks 16 --python /env/bin/python -- {files}"
    ]


def test_each_slurm_task_answers_its_shard(tmp_path):
    environment = programs(tmp_path / "bin", "srun") | {"SLURM_ARRAY_TASK_ID": "3"}
    result = launched("slurm_batch.sh", "--inside", "--tasks", "16", "--", *FILES, **environment)
    assert result.returncode == 0, result.stderr
    expected = ["--ntasks", "1", "python3", "-m", "vl3_jax", "batch", *FILES, "--shard", "3/16"]
    assert result.stdout.splitlines()[1:] == expected


@pytest.mark.parametrize(
    "arguments",
    [(), ("--tasks", "0", "--", *FILES), ("--nodes", "1"), ("--", "--model", "M"), ("--", *FILES, "--shard", "1/2")],
)
def test_slurm_refuses_bad_flags(arguments):
    result = launched("slurm_batch.sh", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("slurm_batch.sh: ")
