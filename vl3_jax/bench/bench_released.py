"""Decoding at a released size with random weights, whose bytes no cache of a processor holds.

Each side runs in a process of its own, one after another, because the weights of two do not fit beside each other.
"""

import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench.bench_decode import generate_ours
from vl3_jax.bench.inputs import NUM_TEXT_IDS, build_reference
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, REFERENCE, Row, Table
from vl3_jax.bench.timing import run_python
from vl3_jax.inference.engine import Engine
from vl3_jax.model import ModelConfig, VideoLLaMA3, preset
from vl3_jax.model.serving_layout import EMBEDDING, abstract_serving_params
from vl3_jax.processing.packed_batch import Sample

INT8 = f"{OURS} int8"
BATCHES = (1, 8)
Generate = Callable[
    [list[Sample], int], float
]  # generates so many tokens for each sample; returns the seconds of decoding


def measure(settings: Settings) -> Table:
    """Measures greedy answers to short prompts of text; the model is the 2B unless another is given."""
    name = "2b" if settings.model == "mid" else settings.model
    prompt, new = (16, 8) if settings.small else (128, 32)
    sides = [OURS, INT8] + [REFERENCE] * (build_reference(lambda module: module)[0] is not None)
    rows = []
    with tempfile.TemporaryDirectory(prefix="vl3-released-") as folder:
        for side in sides:
            file = pathlib.Path(folder) / "seconds.json"
            arguments = side, name, settings.dtype, str(prompt), str(new), str(min(settings.rounds, 3)), str(file)
            usage = run_python("-m", "vl3_jax.bench.bench_released", *arguments)
            for batch, seconds in json.loads(file.read_text()).items():
                case = f"{new} tokens after {batch} x {prompt} tokens"
                amount, figures = int(batch) * (new - 1), {"peak GB": usage.peak_bytes / 1e9}
                rows.append(Row(case, side, seconds, amount, "tokens", None, figures))
    rows.sort(key=lambda row: row.case)
    return Table("released", f"{name}, {settings.dtype} and int8, greedy, random weights", rows, ())


def _ours(config: ModelConfig, dtype: str, quantize: str | None) -> Generate:
    """Returns a side with random weights in the layout in which they are loaded, embeddings in bfloat16."""
    rng = np.random.default_rng(0)

    def weights(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.int8:
            return jnp.asarray(rng.integers(-127, 128, leaf.shape, np.int8))
        stored = jnp.bfloat16 if "/".join(key.key for key in path if hasattr(key, "key")) == EMBEDDING else leaf.dtype
        return jnp.asarray(rng.standard_normal(leaf.shape, dtype=np.float32) * 0.02, stored)

    params = jax.tree_util.tree_map_with_path(weights, abstract_serving_params(config, dtype, quantize))
    engine = Engine(VideoLLaMA3(config, jnp.dtype(dtype), serving=True), params, stop_ids=())

    def generate(samples: list[Sample], new: int) -> float:
        engine.reserve(len(samples))
        return generate_ours(engine, samples, new)[1]

    return generate


def _reference(config: ModelConfig, dtype: str) -> Generate:
    theirs, notes = build_reference(lambda module: module.ReferenceSides(config, dtype))
    assert theirs is not None, notes
    return lambda samples, new: theirs.generate(samples, new)()[1]


def _run(side: str, name: str, dtype: str, prompt: str, new: str, rounds: str, file: str) -> None:
    """Measures one side for each number of samples, and writes the median seconds of decoding by it."""
    config = preset(name)
    generate = (
        _reference(config, dtype) if side == REFERENCE else _ours(config, dtype, "int8" if side == INT8 else None)
    )
    rng, seconds = np.random.default_rng(1), {}
    for batch in BATCHES:
        ids = rng.integers(1, NUM_TEXT_IDS, (batch, int(prompt))).astype(np.int32)
        samples = [Sample(row, np.zeros(len(row), bool), [], np.zeros(len(row), np.float32)) for row in ids]
        generate(samples, int(new))  # compiles
        seconds[batch] = statistics.median(generate(samples, int(new)) for _ in range(int(rounds)))
    pathlib.Path(file).write_text(json.dumps(seconds))


if __name__ == "__main__":
    _run(*sys.argv[1:])
