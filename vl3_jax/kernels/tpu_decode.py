"""Attention of a few queries to a cache for TPUs: one Pallas kernel over the blocks of slots in use.

A grid step processes all heads of a row. The queries of a group, which share their keys, are padded to whole registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vl3_jax.kernels import online_softmax
from vl3_jax.kernels.block_sizes import LANES
from vl3_jax.kernels.decode_inputs import DecodeInputs
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.keys_values import KeysValues, row_numbers
from vl3_jax.kernels.segment_info import round_up

_BLOCK_BYTES = 2**19  # of keys in a grid step: its copy takes longer than the step's fixed cost
_SUBLANES = 8


def tpu_decode_block(cached: KeysValues) -> int:
    """Returns how many slots a grid step processes at most, a power of two."""
    _, _, kv_heads, _, width = cached.keys.shape
    return 1 << max(_BLOCK_BYTES // (kv_heads * width * cached.keys.dtype.itemsize), LANES).bit_length() - 1


def tpu_decode_attention(inputs: DecodeInputs, interpret: bool = False) -> jax.Array:
    """Equals `dense_decode_attention`; D must be a multiple of 128.

    Args:
      inputs: Operands of attention.
      interpret: Whether to interpret the kernel, which works on any device but is slow.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`.
    """
    q, cached, schedule = inputs.q, inputs.keys_values, inputs.schedule
    rows, length, heads, width = q.shape
    kv_heads, block = cached.keys.shape[2], schedule.block
    group = heads // kv_heads
    padded_group = round_up(group, _SUBLANES)
    grouped_q = q.reshape(rows, length, kv_heads, group, width).swapaxes(1, 2)
    grouped_q = jnp.pad(grouped_q, [(0, 0)] * 3 + [(0, padded_group - group), (0, 0)])
    grouped_q = grouped_q.reshape(rows, kv_heads, length * padded_group, width)

    def row_index(b, step, *_):
        return b, 0, 0, 0

    def block_number(b, step, order, count):
        return order[b, jnp.minimum(step, jnp.maximum(count[b] - 1, 0))]

    def allowed_index(b, step, layer, cache_rows, order, count):
        return b, 0, block_number(b, step, order, count)

    def cache_index(b, step, layer, cache_rows, order, count):
        return layer[0], cache_rows[b], 0, block_number(b, step, order, count), 0

    def scales_index(*indices):
        return cache_index(*indices)[:-1]

    q_spec = pl.BlockSpec((None, *grouped_q.shape[1:]), row_index)
    cache_spec = pl.BlockSpec((None, None, kv_heads, block, width), cache_index)
    scales_spec = pl.BlockSpec((None, None, kv_heads, block), scales_index)
    scales = () if cached.key_scales is None else (cached.key_scales, cached.value_scales)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(rows, jnp.maximum(schedule.count.max(), 1)),
        in_specs=[
            q_spec,
            pl.BlockSpec((None, length, block), allowed_index),
            cache_spec,
            cache_spec,
            *[scales_spec for _ in scales],
        ],
        out_specs=q_spec,
        scratch_shapes=[pltpu.VMEM((*grouped_q.shape[1:-1], size), jnp.float32) for size in (1, 1, width)],
    )
    out = pl.pallas_call(
        functools.partial(_kernel, scale=inputs.scale, scaled=bool(scales)),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct(grouped_q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_kernel",
    )(
        inputs.layer[None],
        row_numbers(inputs.rows, q),
        schedule.order,
        schedule.count,
        grouped_q,
        schedule.allowed,
        cached.keys,
        cached.values,
        *scales,
    )
    out = out.reshape(rows, kv_heads, length, padded_group, width)[:, :, :, :group]
    return out.swapaxes(1, 2).reshape(q.shape)


def tpu_decode_unsupported_reason(inputs: DecodeInputs) -> str | None:
    """Returns why the kernel does not support these operands, in a few words; None if it does."""
    slots, width = inputs.keys_values.keys.shape[3:]
    if width % LANES:
        return f"heads of {width} channels, not a multiple of {LANES}"
    if inputs.schedule.block % LANES and inputs.schedule.block != slots:
        return f"a cache of {slots} slots, which has no blocks of a multiple of {LANES}"
    return None


def _kernel(layer, cache_rows, order, count, q, allowed, keys, values, *refs, scale, scaled):
    """Processes one block of slots of a row.

    Queries are [K, L * G, D], where G is padded, keys and values [K, block, D] and `allowed` [L, block]; with int8 keys
    and values the scales of both follow, [K, block]. The output comes next, and the fields of an `OnlineSoftmaxState`
    in VMEM.
    """
    key_scales, value_scales = refs[:2] if scaled else (None, None)
    out, *state_refs = refs[2 * scaled :]
    row, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _():
        for ref, value in zip(state_refs, online_softmax.init(q.shape), strict=True):
            ref[...] = value

    @pl.when(step < count[row])
    def _():
        group = q.shape[1] // allowed.shape[0]
        block = allowed.shape[1]
        masks = [jnp.broadcast_to(allowed[i : i + 1], (group, block)) for i in range(allowed.shape[0])]
        mask = jnp.concatenate(masks) != 0
        for head in range(q.shape[0]):
            scores = einsum("rd,sd->rs", q[head], keys[head].astype(q.dtype), out_dtype=jnp.float32) * scale
            if key_scales is not None:
                scores *= key_scales[head : head + 1]
            value_scale = None if value_scales is None else value_scales[head : head + 1]
            state = online_softmax.OnlineSoftmaxState(*(ref[head] for ref in state_refs))
            head_values = values[head].astype(q.dtype)
            state = online_softmax.update(state, scores, mask, head_values, "rs,sd->rd", value_scale)
            for ref, value in zip(state_refs, state, strict=True):
                ref[head] = value

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        state = online_softmax.OnlineSoftmaxState(*(ref[...] for ref in state_refs))
        out[...] = online_softmax.finalize(state)[0].astype(out.dtype)
