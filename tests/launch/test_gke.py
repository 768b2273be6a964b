"""Manifests: what they ask the cluster for, and whether it would take them."""

import copy

import pytest
import yaml
from launched_scripts import LAUNCH, launched

from vl3_jax.parallel.topologies import parse_topology

JOB = ("--name", "s4", "--image", "registry/vl3", "--config", "configs/stage4_7b.py", "--workdir", "gs://bucket/run")

# Of https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2, the parts that are used.
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
    found = launched("gke/render.py", *JOB, *arguments)
    assert found.returncode == 0, found.stderr
    return yaml.safe_load(found.stdout)


def job_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(jobset):
    return job_of(jobset)["template"]["spec"]


def check(jobset):
    """The JobSet by its schema, what is inside by that of Kubernetes, where these packages are installed."""
    try:
        import jsonschema
    except ImportError:
        pytest.skip("needs jsonschema: pip install -e '.[test]'")
    jsonschema.validate(jobset, JOBSET)
    try:
        import kubernetes_validate
    except ImportError:
        return
    one = copy.deepcopy(jobset["spec"]["replicatedJobs"][0]["template"])
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **one}
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
def test_a_slice_is_asked_for_as_the_cluster_names_it(name, label, shape, hosts, chips):
    found = rendered("--topology", name)
    job, pod = job_of(found), pod_of(found)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    assert job["parallelism"] == job["completions"] == hosts
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["containers"][0]["resources"]["requests"] == {"google.com/tpu": chips}
    assert pod["containers"][0]["args"][-1] == f"--config.expect_devices={parse_topology(name).chips}"


def test_the_cluster_would_take_it():
    check(rendered("--topology", "v5e:8x8", "--slices", "2", "--spot", "--service-account", "trainer"))
    check(rendered("--topology", "v5p-128"))


def test_several_slices_on_spot_machines():
    found = rendered("--topology", "v5e:8x8", "--slices", "3", "--spot", "--config.data.root=gs://my data")
    pod = pod_of(found)
    assert found["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert found["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert pod["containers"][0]["args"] == [
        *("--hang-seconds", "1800", "--grace-seconds", "580", "--"),
        *("--config", "configs/stage4_7b.py", "--workdir", "gs://bucket/run"),
        *("--config.data.root=gs://my data", "--config.expect_devices=192"),
    ]


def test_failures_restart_all_and_bad_input_ends_all():
    found = rendered("--topology", "v5e:8x8")
    job = job_of(found)
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 50
    assert found["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 600
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # as a policy for exit codes demands


def test_processes_of_the_loader_have_room_for_their_rows():
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
def test_bad_input(arguments, text):
    found = launched("gke/render.py", *JOB, *arguments)
    assert found.returncode == 2
    assert text in found.stderr.splitlines()[-1]


def test_the_image_holds_what_the_manifest_calls():
    lines = (LAUNCH / "gke" / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert {"vl3_jax", "data_pipelines", "configs", "launch", "requirements.txt", "setup.py", "README.md"} <= copied
    assert 'ENTRYPOINT ["python", "launch/local.py"]' in lines
