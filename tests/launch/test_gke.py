"""Tests the manifests: what they request from the cluster, and whether they are valid."""

import copy

import pytest
import yaml
from launched_scripts import LAUNCH, launched

from vl3_jax.parallel.topologies import parse_topology

JOB = ("--name", "s4", "--image", "registry/vl3", "--config", "stage4:7b", "--workdir", "gs://bucket/run")

# The parts of https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2 that are used.
JOBSET = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["replicatedJobs"],
            "additionalProperties": False,
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name", "action"],
                                "additionalProperties": False,
                                "properties": {
                                    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {
                                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "FailedIndexes",
                                                "MaxFailedIndexesExceeded",
                                                "PodFailurePolicy",
                                            ]
                                        },
                                    },
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {"type": "object", "required": ["spec"]},
                        },
                    },
                },
            },
        },
    },
}


def rendered(*arguments):
    result = launched("gke/render.py", *JOB, *arguments)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def job_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(jobset):
    return job_of(jobset)["template"]["spec"]


def check(jobset):
    """Validates the JobSet with its schema and the job in it with that of Kubernetes, if the packages are installed."""
    try:
        import jsonschema
    except ImportError:
        pytest.skip("needs jsonschema: pip install -e '.[test]'")
    jsonschema.validate(jobset, JOBSET)
    try:
        import kubernetes_validate
    except ImportError:
        return
    template = copy.deepcopy(jobset["spec"]["replicatedJobs"][0]["template"])
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **template}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("name", "label", "shape", "hosts", "chips"),
    [
        ("v5e:8x8", "tpu-v5-lite-podslice", "8x8", 16, 4),
        ("v5litepod-16", "tpu-v5-lite-podslice", "4x4", 4, 4),
        ("v5e:2x4", "tpu-v5-lite-podslice", "2x4", 1, 8),
        ("v5e:2x2", "tpu-v5-lite-podslice", "2x2", 1, 4),
        ("v5p-128", "tpu-v5p-slice", "4x4x4", 16, 4),
        ("v6e-64", "tpu-v6e-slice", "8x8", 16, 4),
        ("v4:2x2x2", "tpu-v4-podslice", "2x2x2", 2, 4),
    ],
)
def test_a_slice_is_requested_by_the_names_of_the_cluster(name, label, shape, hosts, chips):
    jobset = rendered("--topology", name)
    job, pod = job_of(jobset), pod_of(jobset)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    assert job["parallelism"] == job["completions"] == hosts
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["containers"][0]["resources"]["requests"] == {"google.com/tpu": chips}
    assert pod["containers"][0]["args"][-1] == f"--config.expect_devices={parse_topology(name).chips}"


def test_manifests_are_valid():
    check(rendered("--topology", "v5e:8x8", "--slices", "2", "--spot", "--service-account", "trainer"))
    check(rendered("--topology", "v5p-128"))


def test_several_slices_on_spot_machines():
    jobset = rendered("--topology", "v5e:8x8", "--slices", "3", "--spot", "--config.data.root=gs://my data")
    pod = pod_of(jobset)
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert pod["containers"][0]["args"] == [
        *("--hang-seconds", "1800", "--grace-seconds", "580", "--"),
        *("--config", "stage4:7b", "--workdir", "gs://bucket/run"),
        *("--config.data.root=gs://my data", "--config.expect_devices=192"),
    ]


def test_failures_restart_the_job_and_bad_input_ends_it():
    jobset = rendered("--topology", "v5e:8x8")
    job = job_of(jobset)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 50
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 600
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # required by a policy for exit codes


def test_worker_processes_of_the_data_loader_have_shared_memory():
    pod = pod_of(rendered("--topology", "v5e:8x8"))
    mounted = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert volumes[mounted["/dev/shm"]] == {"medium": "Memory"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--topology", "v9-4"), "topology 'v9-4'"),
        (("--topology", "v5e:1x2"), "machines of 4"),
        (("--topology", "v5e:8x8", "--name", "Stage_4"), "--name Stage_4"),
        (("--topology", "v5e:8x8", "--workdir", "/tmp/x"), "must be gs://"),
        (("--topology", "v5e:8x8", "--slices", "0"), "--slices"),
        (("--topology", "v5e:8x8", "--spott"), "--spott"),
    ],
)
def test_bad_input_is_refused(arguments, text):
    result = launched("gke/render.py", *JOB, *arguments)
    assert result.returncode == 2
    assert text in result.stderr.splitlines()[-1]


def test_the_image_contains_what_the_manifest_runs():
    lines = (LAUNCH / "gke" / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert {"vl3_jax", "data_pipelines", "configs", "launch", "requirements.txt", "setup.py", "README.md"} <= copied
    assert 'ENTRYPOINT ["python", "launch/local.py"]' in lines
