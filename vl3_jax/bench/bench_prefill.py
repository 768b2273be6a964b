"""The decoder without unembedding over one long sample and over many short ones in a row of the same length."""

import functools

import jax.numpy as jnp
import numpy as np

from vl3_jax.bench.inputs import NUM_TEXT_IDS, ModelPair, model_pair, segment_info
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, REFERENCE, SEPARATE_ROWS, Table
from vl3_jax.bench.timing import measure_case
from vl3_jax.model import decode
from vl3_jax.training.flops import StepWork, step_flops

_SAMPLES = 16


def measure(settings: Settings) -> Table:
    """Measures one sample that fills a row, and 16 that fill it together."""
    pair = model_pair(settings)
    length = settings.pick(512, 16_384, 16_384)
    rows = []
    for samples in (1, _SAMPLES):
        tokens = length // samples
        token_ids = np.random.default_rng(0).integers(1, NUM_TEXT_IDS, (samples, tokens))
        sides = {OURS: _ours(settings, pair, token_ids, 1)}
        if samples > 1:
            sides[SEPARATE_ROWS] = _ours(settings, pair, token_ids, samples)
        if pair.reference is not None:
            sides[REFERENCE] = pair.reference.decoder(token_ids)
        work = StepWork(0, 0, 0, length, samples * tokens * (tokens + 1) // 2, 0)
        flops = step_flops(settings.config, work, ())["total"]
        rows += measure_case(f"{samples} x {tokens:,} tokens", sides, settings.rounds, length, "tokens", flops)
    return Table("prefill", f"decoder of {settings.model}, {settings.dtype}, forward", rows, pair.notes)


def _ours(settings: Settings, pair: ModelPair, token_ids: np.ndarray, rows: int):
    segment_ids, positions = segment_info([token_ids.shape[1]] * len(token_ids), rows)
    tokens = jnp.asarray(token_ids.reshape(rows, -1), jnp.int32)
    run = functools.partial(decode, pair.model)
    return settings.compiled(run, pair.params, tokens, None, jnp.full_like(tokens, -1), segment_ids, positions)
