"""A run whose newest checkpoint is damaged goes on from the next whole one, and other commands read that one."""

import dataclasses
import logging
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from etils import epath
from runs import start
from tiny import optimizer_for, start_params

from support.full_disk import files_of_at_most
from vl3_jax.checkpoint import find_tree
from vl3_jax.errors import InputError
from vl3_jax.training.checkpoints import Checkpoints
from vl3_jax.training.run_config import CheckpointConfig
from vl3_jax.training.state import new_state

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def state():
    optimizer = optimizer_for()
    return optimizer, jax.jit(lambda: new_state(optimizer, start_params()))()


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """The workdir of a run with checkpoints after its first and its second step."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    checkpoints = opened(workdir, state[0])
    for step in (1, 2):
        checkpoints.save(step, state[1], {"step": step})
    checkpoints.close()
    return workdir


def opened(workdir, optimizer, **settings) -> Checkpoints:
    return Checkpoints(epath.Path(workdir), optimizer, CheckpointConfig(**settings), has_adapters=False)


def shapes(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def largest(folder):
    """Returns the largest file below a folder: that of the arrays."""
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def as_file(step):
    shutil.rmtree(step)
    step.write_text("")


def empty_all(step):
    for file in step.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


DAMAGES = {
    "all files are empty": empty_all,
    "an array file is empty": lambda step: largest(step / "params").write_bytes(b""),
    "an array file is cut": lambda step: cut(largest(step / "params")),
    "an array file of the moments is cut": lambda step: cut(largest(step / "training")),
    "an array file is gone": lambda step: largest(step / "training").unlink(),
    "the array files are gone": lambda step: shutil.rmtree(step / "params" / "ocdbt.process_0"),
    "no params": lambda step: shutil.rmtree(step / "params"),
    "no training": lambda step: shutil.rmtree(step / "training"),
    "no data": lambda step: shutil.rmtree(step / "data"),
    "an item is a file": lambda step: as_file(step / "training"),
    "_METADATA is cut": lambda step: cut(step / "params" / "_METADATA"),
    "_METADATA is gone": lambda step: (step / "training" / "_METADATA").unlink(),
    "_CHECKPOINT_METADATA is cut": lambda step: cut(step / "_CHECKPOINT_METADATA"),
    "_CHECKPOINT_METADATA is gone": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "an empty folder": lambda step: shutil.rmtree(step) or step.mkdir(),
    "a file": as_file,
    "the state of the data is cut": lambda step: cut(step / "data" / "metadata"),
    "the state of the data is no object": lambda step: (step / "data" / "metadata").write_text("[1]"),
    "the state of the data is no text": lambda step: (step / "data" / "metadata").write_bytes(b"\xff\x00{"),
    "the manifest is gone": lambda step: (step / "params" / "manifest.ocdbt").unlink(),
    "the manifest is empty": lambda step: (step / "training" / "manifest.ocdbt").write_bytes(b""),
    "the manifest is cut": lambda step: cut(step / "training" / "manifest.ocdbt"),
    "the tree of the arrays is gone": lambda step: shutil.rmtree(step / "params" / "d"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_next_whole_one_is_resumed(damage, saved, state, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    damage(workdir / "checkpoints" / "2")
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp-7" / "params").mkdir(parents=True)
    checkpoints = opened(workdir, state[0], keep=2)
    assert checkpoints.latest() in (1, 2)
    with caplog.at_level(logging.WARNING, "vl3_jax"):
        resumed = checkpoints.restore(shapes(state[1]))
    assert (resumed.step, resumed.data_state) == (1, {"step": 1})
    jax.tree.map(np.testing.assert_array_equal, resumed.state, state[1])
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("vl3_jax")]
    assert len(line.splitlines()) == 1
    assert f"{workdir}/checkpoints/2 is damaged (" in line
    assert f"going on from {workdir}/checkpoints/1. The damaged one is now 2.damaged" in line
    for step in (2, 3):
        checkpoints.save(step, state[1], {"step": step})
    checkpoints.close()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "2.damaged", "3"]
    assert find_tree(workdir).parent.name == "3"


def test_none_is_whole(saved, state, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    (workdir / "checkpoints" / "1" / "data" / "metadata").unlink()
    for damage in (lambda step: cut(largest(step / "params")), empty_all):
        damage(workdir / "checkpoints" / "2")
        with pytest.raises(
            InputError, match=r"checkpoints/2: damaged .*, and no other .* or remove \S+/checkpoints to"
        ):
            opened(workdir, state[0]).restore(shapes(state[1]))
        assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]
    with pytest.raises(InputError, match="no other checkpoint is whole"):
        opened(workdir, state[0]).latest()


def test_what_is_put_aside_never_replaces_another(saved, state, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    for _ in range(3):
        shutil.rmtree(workdir / "checkpoints" / "2" / "params")
        checkpoints = opened(workdir, state[0])
        checkpoints.restore(shapes(state[1]))
        checkpoints.save(2, state[1], {"step": 2})
        checkpoints.close()
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert names == ["1", "2", "2.damaged", "2.damaged.2", "2.damaged.3"]


def test_an_error_that_is_no_damage_puts_nothing_aside(saved, state, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)

    def fail(*_arguments, **_options):
        raise MemoryError

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", fail)
    with pytest.raises(MemoryError):
        opened(workdir, state[0]).restore(shapes(state[1]))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("tree", ["params", "training"])
def test_digests_find_flipped_bits(tree, state, tmp_path, caplog):
    workdir = tmp_path / "run"
    checkpoints = opened(workdir, state[0], digests=True)
    checkpoints.save(1, state[1], {"step": 1})
    # What a checkpoint says is what it holds, whatever was saved.
    changed = {
        "params": lambda s: s.replace(params=flipped(s.params)),
        "training": lambda s: s.replace(step=s.step ^ 1),
    }
    other = opened(tmp_path / "other", state[0])
    other.save(2, changed[tree](state[1]), {"step": 2})
    other.close()
    checkpoints.save(2, state[1], {"step": 2})
    checkpoints.close()
    assert opened(workdir, state[0]).restore(shapes(state[1])).step == 2
    shutil.rmtree(workdir / "checkpoints" / "2" / tree)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "2" / tree, workdir / "checkpoints" / "2" / tree)
    assert opened(workdir, state[0]).restore(shapes(state[1])).step == 1
    assert "have other bits than were saved" in caplog.text


def flipped(tree):
    """Returns a tree one bit of which differs."""
    leaves, structure = jax.tree.flatten(tree)
    bits = np.array(leaves[-1])
    bits.reshape(-1).view(np.uint8)[0] ^= 1
    return jax.tree.unflatten(structure, [*leaves[:-1], jax.device_put(bits, leaves[-1].sharding)])


READER_DAMAGES = ("all files are empty", "no params", "_METADATA is cut", "the manifest is gone", "an empty folder")


@pytest.mark.parametrize("damage", READER_DAMAGES)
def test_readers_leave_a_damaged_step_out(damage, saved, tmp_path, caplog):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "vl3.json").write_text("{}")
    DAMAGES[damage](tmp_path / "run" / "checkpoints" / "2")
    assert find_tree(tmp_path / "run").parent.name == "1"
    assert "checkpoints/2 is damaged (" in caplog.text
    assert f"reading {tmp_path}/run/checkpoints/1 instead" in caplog.text
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "1")
    with pytest.raises(InputError, match=r"checkpoints/2: damaged .*, and no older step is whole"):
        find_tree(tmp_path / "run")


def test_space_is_checked_before_the_first_step_and_before_each_save(saved, state, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    checkpoints = opened(workdir, state[0])
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves((state[1], state[1].params))) - state[1].step.nbytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=nbytes))
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    with pytest.raises(InputError, match=r"run/checkpoints: no space left: .* are needed for 2 checkpoints of"):
        checkpoints.check_space(state[1], 4)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"1 checkpoint of .*1\.00 kB are free; free some space, .*, and run the same"):
        checkpoints.save(3, state[1], {"step": 3})
    monkeypatch.undo()
    checkpoints.save(3, state[1], {"step": 3})
    checkpoints.close()
    assert checkpoints.latest() == 3


def cut_object(bucket, suffix):
    name = max((name for name in bucket if suffix in name), key=lambda name: len(bucket[name].data))
    bucket[name] = dataclasses.replace(bucket[name], data=bucket[name].data[: len(bucket[name].data) // 2])


def drop_objects(bucket, suffix):
    for name in [name for name in bucket if suffix in name]:
        del bucket[name]


@pytest.mark.parametrize(
    ("damage", "suffix"),
    [
        (cut_object, "/2/training/"),
        *(
            pytest.param(damage, suffix, marks=pytest.mark.slow)
            for damage in (cut_object, drop_objects)
            for suffix in ("/2/params/_METADATA", "/2/training/", "/2/data/metadata", "/2/params/ocdbt")
            if (damage, suffix) != (cut_object, "/2/training/")
        ),
    ],
)
def test_the_next_whole_one_is_resumed_in_a_bucket(damage, suffix, saved, state, gcs, caplog):
    names = [path.relative_to(saved) for path in saved.rglob("*") if path.is_file()]
    gcs.buckets["damaged"] = {}
    for name in names:
        gcs.put("damaged", f"run/{name}", (saved / name).read_bytes())
    damage(gcs.buckets["damaged"], suffix)
    checkpoints = opened("gs://damaged/run", state[0])
    assert checkpoints.restore(shapes(state[1])).step == 1
    assert "going on from gs://damaged/run/checkpoints/1. The damaged one is now 2.damaged" in caplog.text
    checkpoints.save(2, state[1], {"step": 2})
    checkpoints.close()
    assert {name.split("/")[2] for name in gcs.names("damaged", "run/checkpoints/")} == {"1", "2", "2.damaged"}
    assert opened("gs://damaged/run", state[0]).restore(shapes(state[1])).step == 2


@pytest.mark.slow
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(tmp_path):
    """In a process of its own: writes that Orbax gave up end whenever their memory is freed."""
    arguments = ("stage3:2b", tmp_path / "run", "steps=4", "checkpoint.every=2")
    with files_of_at_most(400_000):
        process = start(*arguments, stderr=subprocess.PIPE, text=True)
    lines = process.communicate()[1].strip().splitlines()
    assert process.returncode == 2
    assert re.match(r"vl3 train: \S+/run/checkpoints: no space left on the disk", lines[-1])
    assert not [line for line in lines if "Traceback" in line]
    process = start(*arguments)
    assert process.wait() == 0
    assert find_tree(tmp_path / "run").parent.name == "4"
