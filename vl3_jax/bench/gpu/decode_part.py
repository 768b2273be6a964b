"""The part `decode`: the decoding program of the engine over caches that are full up to the first new token."""

import functools
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench.gpu.cases import Case, Conditions
from vl3_jax.bench.inputs import step_bytes
from vl3_jax.inference.buckets import round_up_to_bucket
from vl3_jax.inference.programs import STEPS_PER_CALL, DecodeRows, DecodeState, decode_steps
from vl3_jax.inference.sampling import SamplingParams
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.inference.token_masks import free_masks
from vl3_jax.model import KVCache, VideoLLaMA3, init_params, preset


def cases(conditions: Conditions) -> Iterator[Case]:
    """Lists numbers of rows, each with a short and with a long context."""
    name, contexts, rows = ("tiny", (40, 100), (2,)) if conditions.small else ("2b", (2000, 12_000), (1, 8, 32))
    model = VideoLLaMA3(preset(name), jnp.bfloat16, jnp.bfloat16, serving=True)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    for num_rows, context in itertools.product(rows, contexts):
        slots = round_up_to_bucket(context + STEPS_PER_CALL * (1 + conditions.rounds))
        fields = {"rows": num_rows, "context": context, "slots": slots}
        yield Case(fields, functools.partial(_measure, conditions, model, params, num_rows, context, slots))


def _measure(
    conditions: Conditions,
    model: VideoLLaMA3,
    params: dict,
    rows: int,
    context: int,
    slots: int,
    figures: dict[str, Any],
) -> None:
    """Runs the program several times, each time for as many tokens as the engine asks for at once."""
    state = _state(model, rows, context, slots)
    sampling = SamplingParams.of([SamplingConfig(slots)] * rows)
    token, remaining = np.ones(rows, np.int32), np.full(rows, slots, np.int32)
    decode_rows = DecodeRows(
        np.full(rows, slots, np.int32),
        token,
        np.ones(rows, bool),
        np.zeros(rows, bool),
        remaining,
        np.full(rows, -1, np.int32),
        sampling,
        free_masks(rows, model.config.text.vocab_size),
        np.full((rows, STEPS_PER_CALL - 1), model.config.text.vocab_size, np.int32),
    )
    inputs = (decode_rows, np.zeros(0, np.int32), np.int32(STEPS_PER_CALL))
    start = time.perf_counter()
    lowered = decode_steps.lower(model, STEPS_PER_CALL, 0, True, params, state, *inputs)
    program = lowered.compile(conditions.compiler_options(jax.default_backend()))
    figures["compile_seconds"] = time.perf_counter() - start
    seconds = []
    for _ in range(1 + conditions.rounds):
        start = time.perf_counter()
        state, *_ = jax.block_until_ready(program(params, state, *inputs))
        seconds.append((time.perf_counter() - start) / STEPS_PER_CALL)
    figures["seconds"] = statistics.median(seconds[1:])
    figures["tokens_per_second"] = rows / figures["seconds"]
    figures["bytes"] = step_bytes(model, params, rows, context + STEPS_PER_CALL * len(seconds) // 2)
    figures["gb_per_second"] = figures["bytes"] / figures["seconds"] / 1e9
    if conditions.bytes_per_second:
        figures["of_copy"] = figures["bytes"] / figures["seconds"] / conditions.bytes_per_second


def _state(model: VideoLLaMA3, rows: int, context: int, slots: int) -> DecodeState:
    """Makes the state of decoding after `context` tokens, with random keys and values."""
    empty = KVCache.empty(model.config.text, rows, slots, model.dtype, model.serving)
    leaves, structure = jax.tree.flatten(empty.keys_values)
    random = [jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (rows, slots))
    cache = KVCache(
        jax.tree.unflatten(structure, random),
        segment_ids=(positions < context).astype(jnp.int32),
        positions=positions,
        length=jnp.full(rows, context, jnp.int32),
    )
    return DecodeState(cache, generated=jnp.zeros((rows, model.config.text.vocab_size), bool))
