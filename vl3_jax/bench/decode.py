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
from vl3_jax.inference.sampling import Sampling
from vl3_jax.model import decode, unembed
from vl3_jax.processing.packed_batch import Sample

NO_CACHE = "without a cache"
Phases = tuple[float, float]  # seconds of prefill (tower and first token included) and of the other tokens


def measure(settings: Settings) -> Table:
    """One prompt, half of it a picture, answered greedily."""
    both = weights(settings)
    prompt, new = settings.pick((64, 8), (1024, 128), (1024, 256))
    sample = question(np.random.default_rng(0), prompt, prompt // 2)
    engine = Engine(both.model, both.params, stop_ids=())
    sides = {OURS: lambda: ours(engine, sample, new)}
    if both.reference is not None:
        inputs = reference.model_inputs([sample])
        inputs = {name: value.to(both.reference.device) for name, value in inputs.items()}
        sides[reference.SIDE] = lambda: theirs(both.reference, inputs, new)
    again = _whole(settings, both, prompt + new)
    found: dict[str, list[Phases]] = {side: [] for side in (*sides, NO_CACHE)}
    for number in range(settings.rounds + 1):
        for side, run in (*sides.items(), (NO_CACHE, lambda: _timed(again))):
            phases = run()
            if number:
                found[side].append(phases)
    prefill, decoding = ({side: statistics.median(p[i] for p in all_) for side, all_ in found.items()} for i in (0, 1))
    rows = [Row(f"prefill of {prompt:,} tokens", side, prefill[side], prompt, "tokens") for side in sides]
    case, traffic = f"{new} tokens after them", _traffic(both, prompt + new // 2)
    for side in found:
        amount = new - 1 if side in sides else 1
        rate = traffic * amount / decoding[side]
        used = {"of the bandwidth": rate / settings.bandwidth} if side in sides else {}
        rows.append(Row(case, side, decoding[side], amount, "tokens", None, used))
    notes = () if settings.accelerator else ("in miniature: there is no accelerator here",)
    title = f"{settings.model}, {settings.dtype}, batch 1, greedy, of {settings.bandwidth / 1e9:,.3g} GB/s"
    return Table("decode", title, rows, notes + both.notes)


def ours(engine: Engine, sample: Sample, new: int) -> Phases:
    """Generates `new` tokens."""
    timings = Timings()
    list(engine.generate([sample], Sampling(new), timings))
    return timings.prefill, timings.decode


def theirs(model, inputs: dict, new: int) -> Phases:
    """The same by transformers: a run of one token is its prefill."""
    seconds = []
    for count in (1, new):
        begin = time.perf_counter()
        model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        reference.synchronise(model)
        seconds.append(time.perf_counter() - begin)
    return seconds[0], seconds[1] - seconds[0]


def _whole(settings: Settings, both: Weights, length: int):
    """One more token the plain way: the decoder over everything so far."""
    segment = jnp.ones((1, length), jnp.int32)
    position = jnp.arange(length, dtype=jnp.int32)[None]

    def next_token(params: dict) -> jax.Array:
        hidden, _ = decode(both.model, params, segment, None, -segment, segment, position)
        return jnp.argmax(unembed(both.model, params, hidden[:, -1]))

    return settings.compiled(next_token, both.params)


def _timed(run) -> Phases:
    begin = time.perf_counter()
    run()
    return 0.0, time.perf_counter() - begin


def _traffic(both: Weights, length: int) -> float:
    """Bytes that a token reads: the decoder's weights, those of the unembedding included, and the cache."""
    text, item = both.model.config.text, jnp.dtype(both.model.dtype).itemsize
    looked_up = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    cached = 2 * text.num_layers * text.num_kv_heads * text.head_dim
    return item * (text.num_parameters - looked_up + cached * length)
