"""Tests the content of batches, and that it is independent of hosts, workers, threads and interruptions."""

import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_datasets import SETTINGS, assert_holds, bad_records, good_records, make_mixture, turns, write_media

import data_pipelines.loader
from data_pipelines.loader import BatchBuilder, DataWorkerError, Loader
from data_pipelines.sample_errors import TooManyBadSamplesError
from support.samples import random_sample, random_visual
from vl3_jax.errors import InputError
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.processing.packed_batch import BatchShape, pack
from vl3_jax.training import data

PATIENCE = 60  # seconds for what takes a few, on a machine with other work too

ROWS, EPOCHS = 6, 4


@pytest.fixture(scope="module")
def mixture(folder):
    """Samples of two data sets, some of which do not fit the shorter rows."""
    settings = dataclasses.replace(SETTINGS, shorter_lengths=(128,))
    return make_mixture(folder, {"a": good_records(60), "b": good_records(25, seed=1)}, settings, b=2.0)


def digest(batch):
    hashes = {name: hashlib.sha256(np.ascontiguousarray(array).tobytes()) for name, array in batch.arrays.items()}
    return {name: value.hexdigest() for name, value in hashes.items()} | {"samples": batch.samples.tolist()}


def digests(mixture, **options):
    with Loader(mixture, ROWS, **{"epochs": EPOCHS, "seed": 3, **options}) as loader:
        return [digest(batch) for batch in loader]


@pytest.fixture(scope="module")
def uninterrupted(mixture):
    return digests(mixture, threads=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_unpacking_reproduces_every_sample(seed, vision_rows):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(rng.integers(1, 4)):
        row = []
        for _ in range(rng.integers(0, 5)):
            merges = rng.integers(1, 3, rng.integers(0, 4))
            grids = [(int(rng.integers(1, 4)), *(int(m * rng.integers(1, 4)) for _ in range(2))) for m in merges]
            visuals = [random_visual(rng, g, int(m), still=0.5) for g, m in zip(grids, merges, strict=True)]
            row.append(random_sample(rng, visuals, text=int(rng.integers(1, 9))))
        rows.append(row)
    batch = pack(rows, BatchShape(1500, 1500 // vision_rows, 1000, vision_rows, samples=5))
    for number, row in enumerate(rows):
        for segment, sample in enumerate(row, start=1):
            assert_holds(batch, number, segment, sample)


def test_batches_hold_the_samples_they_name(mixture):
    seen = []
    with Loader(mixture, ROWS, threads=2) as loader:
        for batch in loader:
            assert batch.arrays["tokens"].shape[0] == ROWS
            assert batch.samples.shape == (ROWS, SETTINGS.shape.samples)
            for row, members in enumerate(batch.samples):
                for segment, number in enumerate(members[members >= 0].tolist(), start=1):
                    sample = mixture.sample(number, (0, 0))
                    assert_holds(batch.arrays, row, segment, sample)
                    task = mixture.tasks[batch.arrays["sample_task"][row, segment - 1]]
                    assert task == mixture.locate(number)[0].spec.task
                    seen.append(number)
                used = batch.arrays["segment_ids"][row].max()
                assert used == (members >= 0).sum()
    assert sorted(seen) == sorted([*range(60), *range(60, 85), *range(60, 85)])
    assert loader.log.seen == len(seen)
    assert loader.log.bad == 0


@pytest.mark.parametrize(
    "workers", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_workers_change_nothing(mixture, uninterrupted, workers):
    assert digests(mixture, workers=workers) == uninterrupted


def test_threads_change_nothing(mixture, uninterrupted):
    assert digests(mixture, threads=5) == uninterrupted


def test_an_epoch_holds_every_sample_once(mixture, uninterrupted):
    step_plan = mixture.step_plan(ROWS, EPOCHS, 3)
    steps = [-(-len(rows) // ROWS) for rows in step_plan.epochs]
    assert len(uninterrupted) == len(step_plan) == sum(steps)
    for last, count in zip(np.cumsum(steps), steps, strict=True):
        epoch = uninterrupted[last - count : last]
        numbers = np.array([batch["samples"] for batch in epoch]).ravel()
        assert sorted(numbers[numbers >= 0].tolist()) == sorted([*range(60), *[*range(60, 85)] * 2])
    assert uninterrupted[0] != uninterrupted[steps[0]]


@pytest.mark.parametrize("weight", [1.0, 0.01])
def test_a_million_steps_over_ten_samples_begin_at_once(folder, weight):
    mixture = make_mixture(folder, {"few": good_records(10)}, SETTINGS, few=weight)
    started = time.process_time()
    epochs = mixture.epochs_of(1_000_000, ROWS)
    with Loader(mixture, ROWS, epochs=epochs, threads=1) as loader:
        assert len(loader) == 1_000_000
        assert next(loader).step == 0
    assert time.process_time() - started < 15
    assert len(mixture.planned) == len(loader.step_plan.epochs) == 1000
    with Loader(mixture, ROWS, epochs=epochs, threads=1, state={**next(loader).state, "step": 999_999}) as last:
        assert next(last).epoch == epochs - 1
        assert next(last, None) is None


def test_the_epochs_of_some_steps_are_just_enough(mixture):
    for steps in (1, 2, 10, 1000, 2345, 10**6):
        epochs = mixture.epochs_of(steps, ROWS, seed=3)
        assert len(mixture.step_plan(ROWS, epochs, 3)) >= steps
        assert epochs == 1 or len(mixture.step_plan(ROWS, epochs - 1, 3)) < steps


def test_the_rows_of_a_batch_have_one_length(mixture):
    with Loader(mixture, ROWS, epochs=EPOCHS, seed=3) as loader:
        lengths = [batch.arrays["tokens"].shape[1] for batch in loader]
    assert set(lengths) == set(loader.step_plan.lengths) == {128, 512}
    assert lengths == [loader.step_plan[step].length for step in range(len(loader))]


@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_hosts_share_each_step(mixture, uninterrupted, hosts):
    """The rows of a host need not follow each other."""
    rows = [range(ROWS)[host::hosts] for host in range(hosts)]
    order = np.argsort(np.concatenate(rows))
    loaders = [Loader(mixture, ROWS, epochs=EPOCHS, seed=3, rows=own, threads=1) for own in rows]
    for step, parts in enumerate(zip(*loaders, strict=True)):
        arrays = {name: np.concatenate([part.arrays[name] for part in parts])[order] for name in parts[0].arrays}
        samples = np.concatenate([part.samples for part in parts])[order]
        assert digest(dataclasses.replace(parts[0], arrays=arrays, samples=samples)) == uninterrupted[step]


@pytest.mark.parametrize(("after", "workers", "threads"), [(1, 0, 3), (7, 2, None)])
def test_a_resumed_run_is_bit_exact(mixture, uninterrupted, tmp_path, after, workers, threads):
    with Loader(mixture, ROWS, epochs=EPOCHS, seed=3) as loader:
        for _ in range(after):
            batch = next(loader)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "saved", ocp.args.Composite(data=ocp.args.JsonSave(batch.state)))
        state = checkpointer.restore(tmp_path / "saved", ocp.args.Composite(data=ocp.args.JsonRestore())).data
    assert state == {"step": after, "plan": loader.step_plan.identity}
    assert digests(mixture, state=state, workers=workers, threads=threads) == uninterrupted[after:]
    host = Loader(mixture, ROWS, epochs=EPOCHS, seed=3, rows=[2, 3], state=state)
    batch = next(host)
    assert (batch.step, batch.samples.tolist()) == (after, uninterrupted[after]["samples"][2:4])
    host.close()


def test_resuming_after_a_hundred_steps(folder):
    records = [{"conversations": turns(f"Q{n}", "word " * (n % 60))} for n in range(900)]
    shape = BatchShape(length=256, patches=64, vision_tokens=64, samples=8)
    mixture = make_mixture(folder, {"texts": records}, dataclasses.replace(SETTINGS, shape=shape))
    whole = [digest(batch) for batch in Loader(mixture, 1)]
    assert len(whole) > 120
    state = {"step": 100, "plan": mixture.step_plan(1).identity}
    assert [digest(batch) for batch in Loader(mixture, 1, state=state, threads=3)] == whole[100:]
    finished = state | {"step": len(whole)}
    assert list(Loader(mixture, 1, state=finished)) == []


def test_a_state_of_other_data_is_refused(mixture):
    state = {"step": 3, "plan": mixture.step_plan(ROWS, seed=1).identity}
    with pytest.raises(InputError, match="step 3 was saved with other data"):
        Loader(mixture, ROWS, seed=2, state=state)
    with pytest.raises(InputError, match="at least 1"):
        Loader(mixture, 0)


@pytest.mark.parametrize("vision_rows", [1, 2])
def test_an_unreadable_sample_in_a_planned_row_leaves_its_segment_empty(folder, tmp_path, vision_rows):
    shape = dataclasses.replace(SETTINGS.shape, vision_rows=vision_rows, patches=1024 // vision_rows)
    records = [*good_records(30), {"image": ["late.png"], "conversations": turns("Q", "A")}]
    (folder / "late.png").write_bytes((folder / "p0.png").read_bytes())
    mixture = make_mixture(folder, {"late": records}, dataclasses.replace(SETTINGS, shape=shape))
    before = list(Loader(mixture, 2))
    (folder / "late.png").unlink()
    with Loader(mixture, 2) as loader:
        after = list(loader)
    assert (loader.log.seen, loader.log.bad) == (31, 1)
    assert loader.log.kinds == {"missing file": 1}
    assert "late.jsonl, line 31" in loader.log.table()
    emptied = 0
    for expected, batch in zip(before, after, strict=True):
        np.testing.assert_array_equal(expected.samples, batch.samples)
        for row, members in enumerate(batch.samples):
            for segment, number in enumerate(members[members >= 0].tolist(), start=1):
                if number != 30:
                    assert_holds(batch.arrays, row, segment, mixture.sample(number, (0, 0)))
                    continue
                in_segment = batch.arrays["segment_ids"][row] == segment
                assert (in_segment.sum(), batch.arrays["loss_weight"][row][in_segment].sum()) == (1, 0)
                emptied += 1
    assert emptied == 1


def test_bad_records_of_every_kind_are_skipped_and_counted(folder):
    bad = bad_records(folder)
    mixture = make_mixture(folder, {"mixed": [*good_records(30), *bad, *good_records(30)]})
    indexed = mixture.log()
    assert indexed.bad == len(bad) - 1  # the damage of one image is detected only when it is decoded
    with pytest.raises(TooManyBadSamplesError, match=r"of 70 samples are bad.*`vl3 data check`"):
        Loader(mixture, 4)
    with Loader(mixture, 4, bad_share=0.5, threads=2) as loader:
        numbers = np.concatenate([batch.samples.ravel() for batch in loader])
    assert sorted(numbers[numbers >= 0].tolist()) == [*range(30), 36, *range(40, 70)]
    assert loader.log.kinds == {"unreadable media": 1}
    assert "cut.png" in loader.log.table()


def test_a_run_stops_when_its_data_becomes_bad(folder, tmp_path):
    write_media(tmp_path)
    mixture = make_mixture(tmp_path, {"bad": good_records(400)})
    for video in tmp_path.glob("*.mp4"):
        video.unlink()
    with Loader(mixture, 4) as loader, pytest.raises(TooManyBadSamplesError, match=r"allowed") as stopped:
        for _ in loader:
            pass
    assert "missing file" in stopped.value.table
    assert loader.log.seen < 300


def test_all_hosts_stop_at_the_same_step(mixture):
    """If only one host's data is bad, all hosts still stop, at the same step."""
    stopped = []
    for _ in range(2):
        calls = []

        def reduce_counts(counts, calls=calls):
            calls.append(counts)
            return counts + np.array([100, 1000])  # the other host's

        loader = Loader(mixture, 1, epochs=2, reduce_counts=reduce_counts, threads=1)
        with loader, pytest.raises(TooManyBadSamplesError, match="100 of 1,"):
            stopped.extend(batch.step for batch in loader)
        assert len(calls) == 1
    assert stopped == [*range(19)] * 2


def test_a_killed_worker_raises(mixture):
    with Loader(mixture, 1, epochs=50, workers=2) as loader:
        next(loader)
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        workers = [psutil.Process(pid) for pid in before]
        victim = next(p for p in workers if "spawn_main" in " ".join(p.cmdline()) or "grain" in " ".join(p.cmdline()))
        victim.send_signal(signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(DataWorkerError, match="a data worker died at step"):
            for _ in loader:
                pass
        assert time.monotonic() - start < PATIENCE


class Large(BatchBuilder):
    """A builder that does not fit into a pipe."""

    padding = b""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.padding = bytes(10**6)


def test_a_worker_killed_while_it_starts_raises(mixture, monkeypatch):
    monkeypatch.setattr(data_pipelines.loader, "BatchBuilder", Large)

    before = psutil.Process().children()

    def kill():
        while not (started := [p for p in psutil.Process().children() if p not in before]):
            time.sleep(0.001)
        started[0].kill()

    threading.Thread(target=kill).start()
    start = time.monotonic()
    with Loader(mixture, 1, workers=2) as batches, pytest.raises(DataWorkerError, match="a data worker died at step"):
        for _ in batches:
            pass
    assert time.monotonic() - start < PATIENCE


WORKERS = """
import os, sys, time
from data_pipelines.parallel_map import parallel_map
def work(start, stop):
    open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
    time.sleep(60)
if __name__ == "__main__":
    parallel_map(work, [(0, 1), (1, 2)], 2, 2, lambda done, total: None)
"""


def test_workers_end_with_their_parent(tmp_path):
    (tmp_path / "work.py").write_text(WORKERS)
    (tmp_path / "pids").mkdir()
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(data_pipelines.__file__).parents[1])}
    words = [sys.executable, str(tmp_path / "work.py"), str(tmp_path / "pids")]
    parent = subprocess.Popen(words, env=environment)
    deadline = time.monotonic() + PATIENCE
    while len(pids := [int(file.name) for file in (tmp_path / "pids").iterdir()]) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + PATIENCE
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2
    assert not any(map(psutil.pid_exists, pids))


def test_batches_on_a_mesh(mixture):
    mesh = make_mesh({"data": 2, "fsdp": -1}, jax.devices()[:4])
    rows = 8
    assert data.local_rows(mesh, rows) == list(range(rows))
    on_host = list(Loader(mixture, rows, threads=1))
    with Loader(mixture, rows, threads=2) as loader:
        on_mesh = list(data.prefetch_to_device(loader, mesh, rows))
    assert len(on_mesh) == len(on_host)
    for expected, batch in zip(on_host, on_mesh, strict=True):
        assert expected.state == batch.state
        for name, array in expected.arrays.items():
            np.testing.assert_array_equal(array, np.asarray(batch.arrays[name]))
            assert len(batch.arrays[name].sharding.device_set) == 4
            assert batch.arrays[name].addressable_shards[0].data.shape[0] == 2


def test_states_are_json(mixture):
    batch = next(Loader(mixture, ROWS))
    assert json.loads(json.dumps(batch.state)) == batch.state
