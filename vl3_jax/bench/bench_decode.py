"""Generation: prefill with a picture, and decoding, whose bound is the memory's bandwidth."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench import reference
from vl3_jax.bench.inputs import Weights, question, weights
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.inference.engine import Engine, Timings
from vl3_jax.inference.sampling import SamplingConfig
from vl3_jax.model import decode, unembed
from vl3_jax.processing.packed_batch import Sample

NO_CACHE = "without a cache"
BATCHES = (1, 8)
Phases = tuple[float, float]  # seconds of prefill (tower and first token included) and of the other tokens


def measure(settings: Settings) -> Table:
    """Prompts, half of each a picture, answered greedily, one and several at a time."""
    both = weights(settings)
    prompt, new = settings.pick((64, 8), (1024, 128), (1024, 256))
    sample = question(np.random.default_rng(0), prompt, prompt // 2)
    rows = []
    for batch in BATCHES:
        rows += _rows(settings, both, [sample] * batch, prompt, new)
    notes = () if settings.accelerator else ("in miniature: there is no accelerator here",)
    title = f"{settings.model}, {settings.dtype}, greedy, of {settings.bandwidth / 1e9:,.3g} GB/s"
    return Table("decode", title, rows, notes + both.notes)


def _rows(settings: Settings, both: Weights, samples: list[Sample], prompt: int, new: int) -> list[Row]:
    batch = len(samples)
    engine = Engine(both.model, both.params, stop_ids=())
    sides = {OURS: lambda: ours(engine, samples, new)}
    if both.reference is not None:
        inputs = reference.model_inputs(samples)
        inputs = {name: value.to(both.reference.device) for name, value in inputs.items()}
        sides[reference.SIDE] = lambda: theirs(both.reference, inputs, new)
    plain = _whole(settings, both, batch, prompt + new)
    found: dict[str, list[Phases]] = {side: [] for side in (*sides, NO_CACHE)}
    for number in range(settings.rounds + 1):
        for side, run in (*sides.items(), (NO_CACHE, lambda: _timed(plain))):
            phases = run()
            if number:
                found[side].append(phases)
    prefill, decoding = ({side: statistics.median(p[i] for p in all_) for side, all_ in found.items()} for i in (0, 1))
    asked = f"{batch} x {prompt:,} tokens"
    rows = [Row(f"prefill of {asked}", side, prefill[side], batch * prompt, "tokens") for side in sides]
    traffic = _traffic(both, batch, prompt + new // 2)
    for side in found:
        steps = new - 1 if side in sides else 1
        used = {"of the bandwidth": traffic * steps / decoding[side] / settings.bandwidth} if side in sides else {}
        rows.append(Row(f"{new} tokens after {asked}", side, decoding[side], batch * steps, "tokens", None, used))
    return rows


def ours(engine: Engine, samples: list[Sample], new: int) -> Phases:
    """Generates `new` tokens for each."""
    timings = Timings()
    list(engine.generate(samples, SamplingConfig(new), timings))
    return timings.prefill, timings.decode


class _Clock:
    """What transformers tells of its tokens: the prompt first, then each as soon as it is on the host."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def put(self, tokens) -> None:
        self.told.append(time.perf_counter())

    def end(self) -> None:
        pass


def theirs(model, inputs: dict, new: int) -> Phases:
    """The same by transformers."""
    clock = _Clock()
    begin = time.perf_counter()
    model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=clock)
    _, first, *others = clock.told
    return first - begin, others[-1] - first


def _whole(settings: Settings, both: Weights, batch: int, length: int):
    """One more token the plain way: the decoder over everything so far."""
    segment = jnp.ones((batch, length), jnp.int32)
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segment.shape)

    def next_token(params: dict) -> jax.Array:
        hidden, _ = decode(both.model, params, segment, None, -segment, segment, position)
        return jnp.argmax(unembed(both.model, params, hidden[:, -1]))

    return settings.compiled(next_token, both.params)


def _timed(run) -> Phases:
    begin = time.perf_counter()
    run()
    return 0.0, time.perf_counter() - begin


def _traffic(both: Weights, batch: int, length: int) -> float:
    """Bytes that a step reads: the decoder's weights, those of the unembedding included, and the cache of each row."""
    text, item = both.model.config.text, jnp.dtype(both.model.dtype).itemsize
    looked_up = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    cached = 2 * text.num_layers * text.num_kv_heads * text.head_dim
    return item * (text.num_parameters - looked_up + batch * cached * length)
