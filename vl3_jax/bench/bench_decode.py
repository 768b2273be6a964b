"""Generation: prefill of a prompt with an image, and decoding, which is bound by memory bandwidth."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench import reference
from vl3_jax.bench.inputs import ModelPair, model_pair, random_sample
from vl3_jax.bench.settings import REDUCED_SIZES, Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.inference.engine import Engine, Timings
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
    sample = random_sample(np.random.default_rng(0), prompt, prompt // 2)
    rows = []
    for batch in BATCHES:
        rows += _measure_batch(settings, pair, [sample] * batch, prompt, new)
    notes = () if settings.accelerator else (REDUCED_SIZES,)
    title = f"{settings.model}, {settings.dtype}, greedy, of {settings.bandwidth / 1e9:,.3g} GB/s"
    return Table("decode", title, rows, notes + pair.notes)


def _measure_batch(settings: Settings, pair: ModelPair, samples: list[Sample], prompt: int, new: int) -> list[Row]:
    batch = len(samples)
    engine = Engine(pair.model, pair.params, stop_ids=())
    sides = {OURS: lambda: generate_ours(engine, samples, new)}
    if pair.reference is not None:
        inputs = reference.model_inputs(samples)
        inputs = {name: value.to(pair.reference.device) for name, value in inputs.items()}
        sides[reference.SIDE] = lambda: generate_reference(pair.reference, inputs, new)
    uncached = _uncached_step(settings, pair, batch, prompt + new)
    measured: dict[str, list[PhaseSeconds]] = {side: [] for side in (*sides, NO_CACHE)}
    for index in range(settings.rounds + 1):
        for side, run in (*sides.items(), (NO_CACHE, lambda: _timed(uncached))):
            seconds = run()
            if index:  # the first round warms up
                measured[side].append(seconds)
    prefill, decoding = (
        {side: statistics.median(seconds[phase] for seconds in rounds) for side, rounds in measured.items()}
        for phase in (0, 1)
    )
    case = f"{batch} x {prompt:,} tokens"
    rows = [Row(f"prefill of {case}", side, prefill[side], batch * prompt, "tokens") for side in sides]
    step_bytes = _step_bytes(pair, batch, prompt + new // 2)
    for side in measured:
        steps = new - 1 if side in sides else 1
        figures = (
            {"of the bandwidth": step_bytes * steps / decoding[side] / settings.bandwidth} if side in sides else {}
        )
        rows.append(Row(f"{new} tokens after {case}", side, decoding[side], batch * steps, "tokens", None, figures))
    return rows


def generate_ours(engine: Engine, samples: list[Sample], new: int) -> PhaseSeconds:
    """Generates `new` tokens for each sample with our engine."""
    timings = Timings()
    list(engine.generate(samples, SamplingConfig(new), timings))
    return timings.prefill, timings.decode


class _TokenClock:
    """A streamer for transformers' `generate` that records when each token arrives on the host, the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate_reference(model, inputs: dict, new: int) -> PhaseSeconds:
    """Generates `new` tokens for each sample with transformers."""
    clock = _TokenClock()
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=clock)
    _, first, *others = clock.times
    return first - start, others[-1] - first


def _uncached_step(settings: Settings, pair: ModelPair, batch: int, length: int):
    """Compiles one decoding step without a cache: the decoder runs over all `length` tokens."""
    segment_ids = jnp.ones((batch, length), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segment_ids.shape)

    def next_token(params: dict) -> jax.Array:
        hidden, _ = decode(pair.model, params, segment_ids, None, -segment_ids, segment_ids, positions)
        return jnp.argmax(unembed(pair.model, params, hidden[:, -1]))

    return settings.compiled(next_token, pair.params)


def _timed(run) -> PhaseSeconds:
    start = time.perf_counter()
    run()
    return 0.0, time.perf_counter() - start


def _step_bytes(pair: ModelPair, batch: int, length: int) -> float:
    """Returns the bytes that a decoding step reads: the decoder's and unembedding's weights, and each row's cache."""
    text, item_size = pair.model.config.text, jnp.dtype(pair.model.dtype).itemsize
    embedding_lookup = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    cached_per_token = 2 * text.num_layers * text.num_kv_heads * text.head_dim
    return item_size * (text.num_parameters - embedding_lookup + batch * cached_per_token * length)
