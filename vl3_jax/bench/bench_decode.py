"""Generation: prefill of a prompt with an image, and decoding, which is bound by memory bandwidth."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench.inputs import ModelPair, model_pair, random_sample, step_bytes
from vl3_jax.bench.settings import REDUCED_SIZES, Settings
from vl3_jax.bench.table import OURS, REFERENCE, Row, Table
from vl3_jax.bench.timing import results_in_turns, seconds_of
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.requests import Request
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.model import decode, unembed
from vl3_jax.processing.packed_batch import Sample

NO_CACHE = "without a cache"
BATCHES = (1, 8)
PhaseSeconds = tuple[float, float]  # prefill (with the tower and the first token), decoding of the other tokens


def measure(settings: Settings) -> Table:
    """Measures greedy answers to prompts of which one half is an image, one and several at a time."""
    pair = model_pair(settings)
    prompt, new = settings.pick((64, 8), (1024, 128), (1024, 256))
    rng = np.random.default_rng(0)
    samples = [random_sample(rng, prompt, prompt // 2) for _ in range(max(BATCHES))]
    rows = []
    for batch in BATCHES:
        rows += _measure_batch(settings, pair, samples[:batch], prompt, new)
    notes = () if settings.accelerator else (REDUCED_SIZES,)
    title = f"{settings.model}, {settings.dtype}, greedy, of {settings.copy_bytes_per_second / 1e9:,.3g} GB/s"
    return Table("decode", title, rows, notes + pair.notes)


def _measure_batch(settings: Settings, pair: ModelPair, samples: list[Sample], prompt: int, new: int) -> list[Row]:
    batch = len(samples)
    engine = Engine(pair.model, pair.params, stop_ids=(), rows=batch)
    sides = {OURS: lambda: generate_ours(engine, samples, new)}
    if pair.reference is not None:
        sides[REFERENCE] = pair.reference.generate(samples, new)
    uncached = _uncached_step(settings, pair, batch, prompt + new)
    measured = results_in_turns(sides | {NO_CACHE: lambda: (0.0, seconds_of(uncached))}, settings.rounds)
    prefill, decoding = (
        {side: statistics.median(seconds[phase] for seconds in rounds) for side, rounds in measured.items()}
        for phase in (0, 1)
    )
    case = f"{batch} x {prompt:,} tokens"
    rows = [Row(f"prefill of {case}", side, prefill[side], batch * prompt, "tokens") for side in sides]
    read = step_bytes(pair.model, pair.params, batch, prompt + new // 2)
    case = f"{new} tokens after {case}"
    for side in sides:
        figures = {"of the bandwidth": read * (new - 1) / decoding[side] / settings.copy_bytes_per_second}
        rows.append(Row(case, side, decoding[side], batch * (new - 1), "tokens", None, figures))
    return [*rows, Row(case, NO_CACHE, decoding[NO_CACHE], batch, "tokens")]


def generate_ours(engine: Engine, samples: list[Sample], new: int) -> PhaseSeconds:
    """Generates `new` tokens for each sample with our engine, whose first token counts as decoding."""
    engine.forget()
    answers = engine.run(Request(sample, SamplingConfig(new), streams=False) for sample in samples)
    return sum(answer.timings.prefill for answer in answers), max(answer.timings.decode for answer in answers)


def _uncached_step(settings: Settings, pair: ModelPair, batch: int, length: int):
    """Compiles one decoding step without a cache: the decoder runs over all `length` tokens."""
    segment_ids = jnp.ones((batch, length), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segment_ids.shape)

    def next_token(params: dict) -> jax.Array:
        hidden, _ = decode(pair.model, params, segment_ids, None, -segment_ids, segment_ids, positions)
        return jnp.argmax(unembed(pair.model, params, hidden[:, -1]))

    return settings.compiled(next_token, pair.params)
