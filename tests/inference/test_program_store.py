"""Compiled programs on disk: another engine compiles nothing, and damaged or foreign files change no answer."""

import shutil

import jax
import numpy as np
import pytest

from support.samples import random_sample
from support.weights import random_params
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.program_store import ProgramStore
from vl3_jax.inference.requests import Request
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.model import VideoLLaMA3, preset

pytestmark = pytest.mark.usefixtures("fast_compile")
MODEL = VideoLLaMA3(preset("tiny"))
SAMPLE = random_sample(np.random.default_rng(0), [], text=12)


def answer(folder) -> tuple[list[int], list[str]]:
    """Returns the tokens of an answer, and what was compiled for it."""
    compiled: list[str] = []
    engine = Engine(MODEL, random_params(MODEL.config), (), compiled.append, programs_folder=folder)
    (generation,) = engine.run([Request(SAMPLE, SamplingConfig(max_new_tokens=6, repetition_penalty=3.0))])
    return generation.tokens, compiled


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder of programs, and the answer that they gave. A process can store a program only once."""
    folder = tmp_path_factory.mktemp("stored") / "programs"
    expected, compiled = answer(folder)
    assert len(compiled) == len(list(folder.iterdir())) == 3
    return folder, expected


def test_a_later_start_neither_traces_nor_compiles(stored):
    folder, expected = stored
    with jax.no_tracing(True):
        assert answer(folder) == (expected, [])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:40] + b"\0" * 64 + path.read_bytes()[104:]),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["cut off", "empty", "changed", "a folder"],
)
def test_damaged_files_are_compiled_anew(stored, tmp_path, damage):
    folder, expected = stored
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(next(tmp_path.iterdir()))
    tokens, compiled = answer(tmp_path)
    assert (tokens, len(compiled)) == (expected, 1)


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert len(answer(file / "programs")[1]) == 3


def test_other_programs_have_other_files(tmp_path):
    compiled, store = jax.jit(lambda x: x + 1).lower(np.ones(3)).compile(), ProgramStore(tmp_path)
    store.save(compiled, "a", "b")
    assert store.load(jax.local_devices()[:1], "a", "c") is None
    loaded = store.load(jax.local_devices()[:1], "a", "b")
    np.testing.assert_array_equal(loaded(np.ones(3)), compiled(np.ones(3)))
