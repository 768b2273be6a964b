"""Attention over packed rows, against the same code without block skipping and against separate rows.

Attention has the sizes of the released tower (16 heads of 72) and decoder (12 query and 2 key heads of 128); a row is
64 frames of 256 patches, or 16 samples of 1,024 tokens. Separate rows are the ideal cost of packing.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from unittest import mock

import jax
import jax.numpy as jnp

from vl3_jax.bench.inputs import frames, random_arrays, segment_info
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
    shape = (1, count * patches, heads, width)
    packed = random_arrays(settings.dtype, shape, shape, shape)
    separate = [x.reshape(count, patches, heads, width) for x in packed]
    info, separate_info = segment_info([patches] * count), segment_info([patches] * count, count)
    blocked = functools.partial(_attention, _BLOCKWISE, False)
    sides = {
        OURS: (blocked, packed, info),
        NOTHING_SKIPPED: (blocked, packed, info),
        SEPARATE_ROWS: (blocked, separate, separate_info),
        SEPARATE_ROWS_DENSE: (functools.partial(_attention, dense_attention, False), separate, separate_info),
    }
    flops = 4 * count * patches**2 * heads * width
    return _measure(settings, "tower attention", sides, count, "frames", (flops, 3 * flops))


def _decoder_attention(settings: Settings, samples: int, tokens: int) -> list[Row]:
    heads, kv_heads, width = settings.pick((2, 1, 16), (12, 2, 128), (12, 2, 128))
    length = samples * tokens
    packed = random_arrays(settings.dtype, *((1, length, count, width) for count in (heads, kv_heads, kv_heads)))
    separate = [x.reshape(samples, tokens, *x.shape[2:]) for x in packed]
    lengths, blocked = [tokens] * samples, functools.partial(_attention, _BLOCKWISE, True)
    sides = {
        OURS: (blocked, packed, segment_info(lengths)),
        ONE_SAMPLE: (blocked, packed, segment_info([length])),
        SEPARATE_ROWS: (blocked, separate, segment_info(lengths, samples)),
    }
    spans = {side: length if side == ONE_SAMPLE else tokens for side in sides}
    # The mean number of keys is half of the span.
    flops = [{side: n * 2 * heads * width * length * (1 + span) for side, span in spans.items()} for n in (1, 3)]
    return _measure(settings, "decoder attention", sides, length, "tokens", flops)


def _tower_layer(settings: Settings, count: int, patches: int) -> list[Row]:
    """Measures the patch embedding, one layer and the norm after it."""
    config = preset("tiny" if settings.small else "2b")
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_layers=1))
    tower = VisionTower(config.vision, jnp.dtype(settings.dtype), jnp.dtype(settings.dtype))
    params = jax.jit(tower.init)(jax.random.key(0), *(x[:, :, :8] for x in frames(1, patches)))
    packed = (tower.apply, params, *frames(count, patches))
    sides = {
        OURS: packed,
        NOTHING_SKIPPED: packed,
        SEPARATE_ROWS: (tower.apply, params, *frames(count, patches, count)),
    }
    if settings.accelerator:  # accelerators use another attention backend, which always skips
        del sides[NOTHING_SKIPPED]
    work = StepWork(count * patches, count * patches**2, 0, 0, 0, 0)
    flops = [step_flops(config, work, trainable)["total"] for trainable in ((), ("vision",))]
    return _measure(settings, "tower layer", sides, count, "frames", flops)


def _attention(backend: Callable, causal: bool, operands: list[jax.Array], info: SegmentInfo) -> jax.Array:
    """Computes attention of q, k and v to themselves."""
    scale = operands[0].shape[-1] ** -0.5
    return backend(AttentionInputs(*operands, info, info, causal=causal, scale=scale))


def _with_backward(function: Callable) -> Callable:
    """Returns a function that also computes the gradients of the first argument."""

    def run(first, *others):
        out, backward = jax.vjp(lambda first: function(first, *others), first)
        return backward(out)

    return run


def _measure(
    settings: Settings, name: str, sides: Mapping[str, tuple], amount: float, unit: str, flops: Sequence
) -> list[Row]:
    """Measures functions without and with their backward pass.

    Args:
      settings: Settings of the run.
      name: Name of the functions.
      sides: Function and arguments of each side.
      amount: Work of a run in `unit`s.
      unit: Unit of the work.
      flops: Useful arithmetic of the forward pass, and of both passes; as in `measure_case`.
    """
    rounds, rows = 1 if settings.small else max(settings.rounds, _MIN_ROUNDS), []
    passes = ((FORWARD, functools.partial), (FORWARD_BACKWARD, _with_backward))
    for (case, wrapped), case_flops in zip(passes, flops, strict=True):
        programs = {}
        for side, (function, *arguments) in sides.items():
            # Each side wraps the function anew: JAX would reuse the trace of another side.
            with without_skipping() if side == NOTHING_SKIPPED else contextlib.nullcontext():
                programs[side] = settings.compiled(wrapped(function), *arguments)
        turns = {"warm": False, "slow": (NOTHING_SKIPPED, ONE_SAMPLE)}
        figures = temporaries(programs)
        rows += measure_case(f"{name}, {case}", programs, rounds, amount, unit, case_flops, figures, **turns)
    return rows
