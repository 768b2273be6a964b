"""SIGKILL at random moments: no remains load as a wrong checkpoint, and the same command completes the job."""

import dataclasses
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from support.hf_folders import assert_same_tensors, read_tensors, renamed, tiny, write_folder
from vl3_jax.checkpoint import compare, open_source, write_orbax
from vl3_jax.cli.main import main
from vl3_jax.cli.streams import EXIT_INTERRUPTED
from vl3_jax.errors import InputError
from vl3_jax.model import ModelConfig, TextConfig

# Runs a command with pauses around each piece, so that the process is killed while it writes.
CHILD = """
import sys, time
from vl3_jax.storage import jobs
from vl3_jax.cli.main import main

mark_done, commit = jobs.Job.mark_done, jobs.Job.commit

def slow_mark_done(self, *arguments):
    time.sleep(0.004)
    mark_done(self, *arguments)
    time.sleep(0.004)

def slow_commit(self):
    time.sleep(0.05)
    commit(self)
    time.sleep(0.05)

jobs.Job.mark_done, jobs.Job.commit = slow_mark_done, slow_commit
print("ready", flush=True)
sys.exit(main(sys.argv[1:]))
"""


MAX_DELAY = 0.6  # seconds; a complete job takes about twice as long


def many_layers() -> ModelConfig:
    config = tiny(tied=False)
    text: TextConfig = dataclasses.replace(config.text, num_layers=6)
    return dataclasses.replace(config, text=text)


def kill_at(arguments: list[str], delay: float) -> bool:
    """Starts the job and kills it `delay` seconds after it is ready; returns whether it was still running."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, "convert", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdout.readline() == b"ready\n"
    time.sleep(delay)
    running = child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    return running


def loads_wrong(folder, expected) -> bool:
    """Returns whether `folder` opens as a checkpoint whose values differ from those of `expected`."""
    try:
        source = open_source(folder)
    except InputError:
        return False
    return not compare(source, open_source(expected), logits=False, quiet=True).equal


def check_kills(tmp_path, kills: int, seed: int, direction: str) -> None:
    config = many_layers()
    tensors = write_folder(tmp_path / "in", "official", config)
    source, target, options = tmp_path / "in", tmp_path / "out", []
    if direction == "export":
        write_orbax(open_source(tmp_path / "in"), tmp_path / "orbax", quiet=True)
        source, options = tmp_path / "orbax", ["--format", "native"]
    arguments = ["hf" if direction == "hf" else "export", str(source), str(target), *options]
    rng, interrupted = random.Random(seed), 0
    for _ in range(kills):
        interrupted += kill_at(arguments, rng.uniform(0, MAX_DELAY))
        for folder in (target, tmp_path / "out.converting"):
            assert not folder.exists() or not loads_wrong(folder, tmp_path / "in")
        if target.exists():  # the job was complete: start again
            shutil.rmtree(target)
    assert interrupted >= kills // 2, interrupted
    assert main(["convert", *arguments]) == 0
    assert main(["convert", *arguments]) == 0  # nothing is left to do
    assert not (tmp_path / "out.converting").exists()
    result = target
    if direction == "hf":
        assert main(["convert", "verify", "--digests", str(target)]) == 0
        assert main(["convert", "export", str(target), str(tmp_path / "back"), "--format", "native"]) == 0
        result = tmp_path / "back"
    assert_same_tensors(read_tensors(result), renamed(tensors, "official", "native", config))


@pytest.mark.parametrize("direction", ["hf", "export"])
def test_killed_three_times(tmp_path, direction):
    check_kills(tmp_path, kills=3, seed=0, direction=direction)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["hf", "export"])
def test_killed_twenty_times(tmp_path, direction):
    check_kills(tmp_path, kills=20, seed=1, direction=direction)


def test_written_pieces_are_not_written_again(tmp_path, monkeypatch):
    """Pieces recorded as done are skipped unless their file is missing or truncated."""
    from vl3_jax.checkpoint import orbax_write
    from vl3_jax.storage import jobs

    write_folder(tmp_path / "in", "official", tiny())
    written, original = [], orbax_write._write_slice

    def failing(source, path, layer, *rest):
        if len(written) == 40:
            raise KeyboardInterrupt
        result = original(source, path, layer, *rest)
        written.append((path, layer))
        return result

    monkeypatch.setattr(jobs, "WORKERS", 1)
    monkeypatch.setattr(orbax_write, "_write_slice", failing)
    assert main(["convert", "hf", str(tmp_path / "in"), str(tmp_path / "out")]) == EXIT_INTERRUPTED
    first, partial = list(written), tmp_path / "out.converting"
    assert len(first) == 40
    (partial / "vision.patch_embed.bias" / "0").unlink()
    chunk = partial / "vision.layers.ln1.scale" / "1.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    written.clear()
    monkeypatch.setattr(orbax_write, "_write_slice", lambda *a: (original(*a), written.append(a[1:3]))[0])
    assert main(["convert", "hf", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert set(written) & set(first) == {("vision/patch_embed/bias", None), ("vision/layers/ln1/scale", 1)}
    source = open_source(tmp_path / "in")
    assert len(set(written) | set(first)) == sum(len(spec.tensors) for spec in source.leaves.values())


def test_another_source_starts_over(tmp_path, monkeypatch, capfd):
    from vl3_jax.checkpoint import orbax_write

    write_folder(tmp_path / "a", "official", tiny(), seed=1)
    tensors = write_folder(tmp_path / "b", "official", tiny(), seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(orbax_write, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["convert", "hf", str(tmp_path / "a"), str(tmp_path / "out")]) == EXIT_INTERRUPTED
    assert main(["convert", "hf", str(tmp_path / "b"), str(tmp_path / "out")]) == 0
    assert "starting over" in capfd.readouterr().err
    assert main(["convert", "export", str(tmp_path / "out"), str(tmp_path / "back"), "--format", "official"]) == 0
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)
