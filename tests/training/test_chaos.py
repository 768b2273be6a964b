"""A job of two processes that is killed, stopped, left without space and robbed of checkpoints learns the same."""

import jax
import numpy as np
import pytest
from chaos import BucketFiles, LocalFiles, Supervisor, moments

from vl3_jax.checkpoint import load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compile")]
STEPS = 80
# Of each step, what does not depend on the time it took.
LEARNED = ("step", "loss", "grad norm", "epoch")


def check_equal(disturbed, whole):
    """Compares final weights bitwise, and the logs, which have each step once."""
    assert disturbed.steps()[-1] == whole.steps()[-1] == STEPS
    jax.tree.map(np.testing.assert_array_equal, *(load(run.workdir).params for run in (disturbed, whole)))
    lines = [[{name: line[name] for name in LEARNED} for line in run.log()] for run in (disturbed, whole)]
    assert [line["step"] for line in lines[0]] == list(range(1, STEPS + 1))
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    supervisor = Supervisor(folder / "run", LocalFiles(folder / "run"), folder / "said", f"steps={STEPS}")
    supervisor.run()
    return supervisor


def test_a_disturbed_job_ends_with_the_same_weights(whole, tmp_path):
    run = Supervisor(tmp_path / "run", LocalFiles(tmp_path / "run"), tmp_path / "said", f"steps={STEPS}")
    for moment in moments(seed=1, count=20):
        run.disturb(moment)
    run.run()
    check_equal(run, whole)


def test_a_disturbed_job_in_a_bucket_ends_with_the_same_weights(whole, gcs, tmp_path):
    gcs.buckets["chaos"] = {}
    files = BucketFiles(gcs, "chaos", "run")
    run = Supervisor("gs://chaos/run", files, tmp_path / "said", f"steps={STEPS}")
    for moment in moments(seed=2, count=6, kinds=("kill", "term", "hup", "freeze", "damage", "kill")):
        run.disturb(moment)
    run.run()
    check_equal(run, whole)
