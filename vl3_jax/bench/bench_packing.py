"""Attention over packed rows, against the same code without block skipping and against separate rows.

Attention has the sizes of the released tower (16 heads of 72) and decoder (12 query and 2 key heads of 128); a row is
64 frames of 256 patches, or 16 samples of 1,024 tokens. Separate rows are the ideal cost of packing.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import jax.numpy as jnp

from vl3_jax.bench.inputs import frames, segment_info
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, SEPARATE_ROWS, Row, Table
from vl3_jax.bench.timing import measure_case, temporaries
from vl3_jax.kernels import blockwise
from vl3_jax.kernels.backend import AttentionInputs, attend
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model import preset
from vl3_jax.model.vision import VisionTower
from vl3_jax.training.flops import StepWork, step_flops

NOTHING_SKIPPED, ONE_SAMPLE = "nothing skipped", "one sample"
SEPARATE_ROWS_DENSE = "separate rows, dense"
FORWARD, FORWARD_BACKWARD = "forward", "forward and backward"
_MIN_ROUNDS = 9
_BLOCKWISE = functools.partial(attend, blockwise.BLOCKWISE)


def measure(settings: Settings) -> Table:
    """Measures tower attention, a tower layer and decoder attention, each without and with its backward pass."""
    count, patches = settings.pick((8, 32), (64, 256), (64, 256))
    samples, tokens = settings.pick((4, 64), (16, 1024), (16, 1024))
    rows = [
        *_tower_attention(settings, count, patches),
        *_tower_layer(settings, count, patches),
        *_decoder_attention(settings, samples, tokens),
    ]
    notes = ("'nothing skipped' computes every pair of blocks, 'one sample' is causal over the whole row",)
    return Table("packing", f"{count} frames of {patches} patches, {samples} samples of {tokens} tokens", rows, notes)


@contextlib.contextmanager
def without_skipping() -> Iterator[None]:
    """Makes blockwise attention that is traced inside this context compute every pair of blocks."""

    def all_blocks(q_info: SegmentInfo, kv_info: SegmentInfo, q_block: int, kv_block: int, causal: bool) -> jax.Array:
        del causal
        rows, q_length = q_info.segment_ids.shape
        shape = (rows, q_length // q_block, kv_info.segment_ids.shape[1] // kv_block)
        return jnp.ones(shape, bool)

    with mock.patch.object(blockwise, "active_blocks", all_blocks):
        yield


def _tower_attention(settings: Settings, count: int, patches: int) -> list[Row]:
    heads, width = settings.pick((2, 16), (16, 72), (16, 72))
    operands = _operands(settings, count * patches, heads, heads, width)
    packed, separate = segment_info([patches] * count), segment_info([patches] * count, count)
    separate_operands = [x.reshape(count, patches, *x.shape[2:]) for x in operands]
    rows = []
    for case, run in _attention_functions():
        blocked, dense = (functools.partial(run, backend, False) for backend in (_BLOCKWISE, dense_attention))
        sides = {OURS: settings.compiled(blocked, packed, *operands)}
        with without_skipping():
            untraced = functools.partial(run, _BLOCKWISE, False)  # JAX would reuse the trace of `blocked`
            sides[NOTHING_SKIPPED] = settings.compiled(untraced, packed, *operands)
        sides |= {
            SEPARATE_ROWS: settings.compiled(blocked, separate, *separate_operands),
            SEPARATE_ROWS_DENSE: settings.compiled(dense, separate, *separate_operands),
        }
        flops = _work_factor(case) * 4 * count * patches**2 * heads * width
        rows += _measure(settings, f"tower attention, {case}", sides, count, "frames", flops)
    return rows


def _decoder_attention(settings: Settings, samples: int, tokens: int) -> list[Row]:
    heads, kv_heads, width = settings.pick((2, 1, 16), (12, 2, 128), (12, 2, 128))
    operands = _operands(settings, samples * tokens, heads, kv_heads, width)
    packed, separate = segment_info([tokens] * samples), segment_info([tokens] * samples, samples)
    separate_operands = [x.reshape(samples, tokens, *x.shape[2:]) for x in operands]
    rows = []
    for case, run in _attention_functions():
        blocked = functools.partial(run, _BLOCKWISE, True)
        sides = {
            OURS: settings.compiled(blocked, packed, *operands),
            ONE_SAMPLE: settings.compiled(blocked, segment_info([samples * tokens]), *operands),
            SEPARATE_ROWS: settings.compiled(blocked, separate, *separate_operands),
        }
        length = samples * tokens
        flops_per_key = _work_factor(case) * 2 * heads * width * length  # the mean number of keys is half of the span
        flops = {side: flops_per_key * (1 + (length if side == ONE_SAMPLE else tokens)) for side in sides}
        rows += _measure(settings, f"decoder attention, {case}", sides, length, "tokens", flops)
    return rows


def _tower_layer(settings: Settings, count: int, patches: int) -> list[Row]:
    """Measures the patch embedding, one layer and the norm after it."""
    config = preset("tiny" if settings.small else "2b")
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_layers=1))
    tower = VisionTower(config.vision, jnp.dtype(settings.dtype), jnp.dtype(settings.dtype))
    init_inputs = [x[:, :, :8] for x in frames(1, patches)]
    params = jax.jit(tower.init)(jax.random.key(0), *init_inputs)

    def forward(params, *arrays):
        return tower.apply(params, *arrays)

    def gradients(params, *arrays):
        return jax.grad(lambda params: jnp.sum(forward(params, *arrays).astype(jnp.float32)))(params)

    rows, packed, separate = [], frames(count, patches), frames(count, patches, count)
    work = StepWork(count * patches, count * patches**2, 0, 0, 0, 0)
    for case, function in ((FORWARD, forward), (FORWARD_BACKWARD, gradients)):
        sides = {OURS: settings.compiled(function, params, *packed)}
        if not settings.accelerator:  # accelerators use another attention backend, which always skips
            with without_skipping():
                untraced = functools.partial(function)
                sides[NOTHING_SKIPPED] = settings.compiled(untraced, params, *packed)
        sides[SEPARATE_ROWS] = settings.compiled(function, params, *separate)
        flops = step_flops(config, work, () if case == FORWARD else ("vision",))["total"]
        rows += _measure(settings, f"tower layer, {case}", sides, count, "frames", flops)
    return rows


def _attention_functions() -> list[tuple[str, Callable]]:
    """Returns attention without and with its backward pass, by case."""

    def forward(backend, causal, info, q, k, v):
        return backend(AttentionInputs(q, k, v, info, info, causal=causal, scale=q.shape[-1] ** -0.5))

    def forward_backward(backend, causal, info, q, k, v):
        out, backward = jax.vjp(functools.partial(forward, backend, causal, info), q, k, v)
        return backward(out)

    return [(FORWARD, forward), (FORWARD_BACKWARD, forward_backward)]


def _operands(settings: Settings, length: int, heads: int, kv_heads: int, width: int) -> list[jax.Array]:
    """Generates q, k and v of one row."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, length, count, width) for count in (heads, kv_heads, kv_heads)]
    return [jax.random.normal(key, shape, settings.dtype) for key, shape in zip(keys, shapes, strict=True)]


def _work_factor(case: str) -> int:
    """Returns the work in forward passes; a backward pass has twice the matrix products of a forward pass."""
    return 1 if case == FORWARD else 3


def _measure(settings: Settings, case: str, sides: dict, amount: float, unit: str, flops) -> list[Row]:
    rounds = 1 if settings.small else max(settings.rounds, _MIN_ROUNDS)
    slow = (NOTHING_SKIPPED, ONE_SAMPLE)
    return measure_case(case, sides, rounds, amount, unit, flops, temporaries(sides), warm=False, slow=slow)
