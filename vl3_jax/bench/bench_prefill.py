"""The decoder over one long sample and over many short ones in a row of the same length, without the unembedding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench import reference
from vl3_jax.bench.inputs import WORDS, Weights, labels, weights
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.bench.timing import in_turns
from vl3_jax.model import decode
from vl3_jax.training.flops import StepWork, step_flops

ALONE = "separate rows"
_SAMPLES = 16


def measure(settings: Settings) -> Table:
    """One sample that fills the row, and 16 that fill it together."""
    both = weights(settings)
    length = settings.pick(512, 16_384, 16_384)
    rows = []
    for samples in (1, _SAMPLES):
        tokens = length // samples
        words = np.random.default_rng(0).integers(1, WORDS, (samples, tokens))
        sides = {OURS: _ours(settings, both, words, 1)}
        if samples > 1:
            sides[ALONE] = _ours(settings, both, words, samples)
        if both.reference is not None:
            sides[reference.SIDE] = _theirs(both, words)
        work = StepWork(0, 0, 0, length, samples * tokens * (tokens + 1) // 2, 0)
        flops = step_flops(settings.config, work, ())["total"]
        seconds = in_turns(sides, settings.rounds)
        case = f"{samples} x {tokens:,} tokens"
        rows += [Row(case, side, time, length, "tokens", flops) for side, time in seconds.items()]
    return Table("prefill", f"decoder of {settings.model}, {settings.dtype}, forward", rows, both.notes)


def _ours(settings: Settings, both: Weights, words: np.ndarray, rows: int):
    segments, positions = labels([words.shape[1]] * len(words), rows)
    tokens = jnp.asarray(words.reshape(rows, -1), jnp.int32)
    run = functools.partial(_hidden, both.model)
    return settings.compiled(run, both.params, tokens, jnp.full_like(tokens, -1), segments, positions)


def _hidden(model, params: dict, tokens: jax.Array, *arrays: jax.Array) -> jax.Array:
    return decode(model, params, tokens, None, *arrays)[0]


def _theirs(both: Weights, words: np.ndarray):
    import torch

    model = both.reference.model.language_model
    ids = torch.tensor(words).to(model.device)
    return reference.finished(model, lambda: model(input_ids=ids, use_cache=False))
