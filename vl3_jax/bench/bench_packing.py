"""Whether cost follows the segments: packed rows beside the same code that skips nothing, and beside separate rows.

Attention has the sizes of the released tower (16 heads of 72) and decoder (12 query and 2 key heads of 128); a row is
64 frames of 256 patches, or 16 samples of 1,024 tokens. Separate rows are what packing could cost at best.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import jax.numpy as jnp

from vl3_jax.bench.inputs import frames, labels
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.bench.timing import in_turns
from vl3_jax.kernels import blockwise
from vl3_jax.kernels.blockwise import blockwise_attention
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model import preset
from vl3_jax.model.vision import VisionTower
from vl3_jax.training.flops import StepWork, step_flops

NOTHING_SKIPPED, ONE_SAMPLE = "nothing skipped", "one sample"
ALONE, ALONE_DENSE = "separate rows", "separate rows, dense"
FORWARD, BOTH = "forward", "forward and backward"
_ROUNDS = 9


def measure(settings: Settings) -> Table:
    """Attention of the tower, a layer of it, and attention of the decoder, each forward and with its backward pass."""
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
def skipping_nothing() -> Iterator[None]:
    """Blockwise attention that is traced here computes every pair of blocks."""

    def everything(q: SegmentInfo, kv: SegmentInfo, q_block: int, kv_block: int, causal: bool) -> jax.Array:
        del causal
        shape = (len(q.segment_ids), q.segment_ids.shape[1] // q_block, kv.segment_ids.shape[1] // kv_block)
        return jnp.ones(shape, bool)

    with mock.patch.object(blockwise, "active_blocks", everything):
        yield


def _tower_attention(settings: Settings, count: int, patches: int) -> list[Row]:
    heads, width = settings.pick((2, 16), (16, 72), (16, 72))
    operands = _operands(settings, count * patches, heads, heads, width)
    together, apart = SegmentInfo(*labels([patches] * count)), SegmentInfo(*labels([patches] * count, count))
    alone = [x.reshape(count, patches, *x.shape[2:]) for x in operands]
    rows = []
    for case, run in _passes():
        blocks, dense = (functools.partial(run, backend, False) for backend in (blockwise_attention, dense_attention))
        sides = {OURS: settings.compiled(blocks, together, *operands)}
        with skipping_nothing():
            again = functools.partial(run, blockwise_attention, False)  # what was traced once is not traced again
            sides[NOTHING_SKIPPED] = settings.compiled(again, together, *operands)
        sides |= {ALONE: settings.compiled(blocks, apart, *alone), ALONE_DENSE: settings.compiled(dense, apart, *alone)}
        flops = _times(case) * 4 * count * patches**2 * heads * width
        rows += _rows(settings, f"tower attention, {case}", sides, count, "frames", flops)
    return rows


def _decoder_attention(settings: Settings, samples: int, tokens: int) -> list[Row]:
    heads, kv_heads, width = settings.pick((2, 1, 16), (12, 2, 128), (12, 2, 128))
    operands = _operands(settings, samples * tokens, heads, kv_heads, width)
    together, apart = SegmentInfo(*labels([tokens] * samples)), SegmentInfo(*labels([tokens] * samples, samples))
    alone = [x.reshape(samples, tokens, *x.shape[2:]) for x in operands]
    rows = []
    for case, run in _passes():
        blocks = functools.partial(run, blockwise_attention, True)
        sides = {
            OURS: settings.compiled(blocks, together, *operands),
            ONE_SAMPLE: settings.compiled(blocks, SegmentInfo(*labels([samples * tokens])), *operands),
            ALONE: settings.compiled(blocks, apart, *alone),
        }
        flops, length = _times(case) * 2 * heads * width * samples * tokens, samples * tokens
        longer = {ONE_SAMPLE: flops * (length + 1)}
        rows += _rows(settings, f"decoder attention, {case}", sides, length, "tokens", flops * (tokens + 1), longer)
    return rows


def _tower_layer(settings: Settings, count: int, patches: int) -> list[Row]:
    """Patch embedding, one layer and the norm after it."""
    config = preset("tiny" if settings.small else "2b")
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_layers=1))
    tower = VisionTower(config.vision, jnp.dtype(settings.dtype), jnp.dtype(settings.dtype))
    few = [x[:, :, :8] for x in frames(1, patches)]
    params = jax.jit(tower.init)(jax.random.key(0), *few)

    def forward(params, *arrays):
        return tower.apply(params, *arrays)

    def both(params, *arrays):
        return jax.grad(lambda params: jnp.sum(forward(params, *arrays).astype(jnp.float32)))(params)

    rows, together, apart = [], frames(count, patches), frames(count, patches, count)
    work = StepWork(count * patches, count * patches**2, 0, 0, 0, 0)
    for case, function in ((FORWARD, forward), (BOTH, both)):
        sides = {OURS: settings.compiled(function, params, *together)}
        if not settings.accelerator:  # where the tower's attention is the one that can be told not to skip
            with skipping_nothing():
                again = functools.partial(function)
                sides[NOTHING_SKIPPED] = settings.compiled(again, params, *together)
        sides[ALONE] = settings.compiled(function, params, *apart)
        flops = step_flops(config, work, () if case == FORWARD else ("vision",))["total"]
        rows += _rows(settings, f"tower layer, {case}", sides, count, "frames", flops)
    return rows


def _passes() -> list[tuple[str, Callable]]:
    def forward(backend, causal, labels, q, k, v):
        return backend(q, k, v, labels, labels, causal=causal, scale=q.shape[-1] ** -0.5)

    def both(backend, causal, labels, q, k, v):
        out, backward = jax.vjp(functools.partial(forward, backend, causal, labels), q, k, v)
        return backward(out)

    return [(FORWARD, forward), (BOTH, both)]


def _operands(settings: Settings, length: int, heads: int, kv_heads: int, width: int) -> list[jax.Array]:
    """q, k and v of one row."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, length, count, width) for count in (heads, kv_heads, kv_heads)]
    return [jax.random.normal(key, shape, settings.dtype) for key, shape in zip(keys, shapes, strict=True)]


def _times(case: str) -> int:
    """A backward pass has twice the products of the forward one."""
    return 1 if case == FORWARD else 3


def _rows(settings: Settings, case: str, sides: dict, amount: float, unit: str, flops: float, other=None) -> list[Row]:
    """Measured rows; `other` holds the FLOPs of sides with more to do."""
    other = other or {}
    rounds = 1 if settings.small else max(settings.rounds, _ROUNDS)
    seconds = in_turns(sides, rounds, warm=False, slow=(NOTHING_SKIPPED, ONE_SAMPLE))
    return [
        Row(case, side, seconds[side], amount, unit, other.get(side, flops), {"temporaries MB": run.temporaries / 1e6})
        for side, run in sides.items()
    ]
