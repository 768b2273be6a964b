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


def tpu_decode_attention(inputs: DecodeInputs, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Equals `dense_decode_attention`; D must be a multiple of 128.

    Args:
      inputs: Operands of attention.
      interpret: Whether to interpret the kernel, which works on any device but is slow.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`, and the rotated keys of the new tokens, [B, L, K, D].
    """
    q, cached, schedule = inputs.q, inputs.keys_values, inputs.schedule
    rows, length, heads, width = q.shape
    kv_heads, block = cached.keys.shape[2], schedule.block
    group = heads // kv_heads
    padded_group = round_up(group, _SUBLANES)
    grouped_q = q.reshape(rows, length, kv_heads, group, width).swapaxes(1, 2)
    grouped_q = jnp.pad(grouped_q, [(0, 0)] * 3 + [(0, padded_group - group), (0, 0)])
    grouped_q = grouped_q.reshape(rows, kv_heads, length * padded_group, width)
    new_k, new_v = inputs.k.swapaxes(1, 2), inputs.v.swapaxes(1, 2)

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

    def flat_row_index(b, step, *_):
        return b, 0, 0

    q_spec, new_spec = (pl.BlockSpec((None, *x.shape[1:]), row_index) for x in (grouped_q, new_k))
    cache_spec = pl.BlockSpec((None, None, kv_heads, block, width), cache_index)
    scales_spec = pl.BlockSpec((None, None, kv_heads, block), scales_index)
    scales = () if cached.key_scales is None else (cached.key_scales, cached.value_scales)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(rows, jnp.maximum(schedule.count.max(), 1)),
        in_specs=[
            q_spec,
            new_spec,
            new_spec,
            pl.BlockSpec((None, length, width), flat_row_index),
            pl.BlockSpec((None, length, length), flat_row_index),
            pl.BlockSpec((None, length, block), allowed_index),
            cache_spec,
            cache_spec,
            *[scales_spec for _ in scales],
        ],
        out_specs=[q_spec, new_spec],
        scratch_shapes=[
            pltpu.VMEM(grouped_q.shape[1:], q.dtype),
            *[pltpu.VMEM((*grouped_q.shape[1:-1], size), jnp.float32) for size in (1, 1, width)],
        ],
    )
    out, new_k = pl.pallas_call(
        functools.partial(_kernel, scale=inputs.scale, scaled=bool(scales)),
        grid_spec=grid_spec,
        out_shape=[jax.ShapeDtypeStruct(x.shape, q.dtype) for x in (grouped_q, new_k)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_kernel",
    )(
        inputs.layer[None],
        row_numbers(inputs.rows, q),
        schedule.order,
        schedule.count,
        grouped_q,
        new_k,
        new_v,
        inputs.rotary,
        schedule.allowed_new,
        schedule.allowed,
        cached.keys,
        cached.values,
        *scales,
    )
    out = out.reshape(rows, kv_heads, length, padded_group, width)[:, :, :, :group]
    return out.swapaxes(1, 2).reshape(q.shape), new_k.swapaxes(1, 2)


def tpu_decode_unsupported_reason(inputs: DecodeInputs) -> str | None:
    """Returns why the kernel does not support these operands, in a few words; None if it does."""
    slots, width = inputs.keys_values.keys.shape[3:]
    if width % LANES:
        return f"heads of {width} channels, not a multiple of {LANES}"
    if inputs.schedule.block % LANES and inputs.schedule.block != slots:
        return f"a cache of {slots} slots, which has no blocks of a multiple of {LANES}"
    return None


def _kernel(
    layer, cache_rows, order, count, q, new_k, new_v, rotary, allowed_new, allowed, keys, values, *refs, scale, scaled
):
    """Processes one block of slots of a row, and before the first one the new tokens.

    Queries are [K, L * G, D], where G is padded, new keys and values [K, L, D], the rotary table [L, D], `allowed_new`
    [L, L] and `allowed` [L, block]; keys and values [K, block, D], which have scales of [K, block] if they are int8.
    Then come the output, the rotated new keys, and in VMEM the rotated queries and the fields of an
    `OnlineSoftmaxState`.
    """
    key_scales, value_scales = refs[:2] if scaled else (None, None)
    out, rotated_k, rotated_q, *state_refs = refs[2 * scaled :]
    row, step = pl.program_id(0), pl.program_id(1)
    kv_heads, length = new_k.shape[:2]
    group = q.shape[1] // length

    def of_queries(rows: jax.Array) -> jax.Array:
        """Repeats the row of each token for its queries, [L, n] -> [L * G, n]."""
        parts = [jnp.broadcast_to(rows[i : i + 1], (group, rows.shape[1])) for i in range(length)]
        return jnp.concatenate(parts) if length > 1 else parts[0]

    def add(head: int, scores, mask, values, equation, value_scales=None):
        state = online_softmax.OnlineSoftmaxState(*(ref[head] for ref in state_refs))
        state = online_softmax.update(state, scores, mask, values, equation, value_scales)
        for ref, value in zip(state_refs, state, strict=True):
            ref[head] = value

    @pl.when(step == 0)
    def _():
        for ref, value in zip(state_refs, online_softmax.init(q.shape), strict=True):
            ref[...] = value
        cos, sin = _factors(rotary[...])
        q_cos, q_sin = of_queries(cos), of_queries(sin)
        mask = of_queries(allowed_new[...]) != 0
        for head in range(kv_heads):
            rotated_q[head] = _rotated(q[head], q_cos, q_sin).astype(q.dtype)
            rotated_k[head] = _rotated(new_k[head], cos, sin).astype(new_k.dtype)
            queries, new_keys = rotated_q[head].astype(jnp.float32), rotated_k[head].astype(jnp.float32)
            for token in range(length):
                scores = (queries * new_keys[token : token + 1]).sum(-1, keepdims=True) * scale
                add(head, scores, mask[:, token : token + 1], new_v[head][token : token + 1], None)

    @pl.when(step < count[row])
    def _():
        mask = of_queries(allowed[...]) != 0
        for head in range(kv_heads):
            head_keys = keys[head].astype(q.dtype)
            scores = einsum("rd,sd->rs", rotated_q[head], head_keys, out_dtype=jnp.float32) * scale
            if key_scales is not None:
                scores *= key_scales[head : head + 1]
            value_scale = None if value_scales is None else value_scales[head : head + 1]
            add(head, scores, mask, values[head].astype(q.dtype), "rs,sd->rd", value_scale)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        state = online_softmax.OnlineSoftmaxState(*(ref[...] for ref in state_refs))
        out[...] = online_softmax.finalize(state)[0].astype(out.dtype)


def _factors(table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns by what a channel and its partner are multiplied, [L, D] each, from a rotary table."""
    half = table.shape[1] // 2
    is_first = jax.lax.broadcasted_iota(jnp.int32, table.shape, 1) < half
    swapped = pltpu.roll(table, half, 1)
    return jnp.where(is_first, table, swapped), jnp.where(is_first, -swapped, table)


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the channels of heads, [rows, D]; the result is float32."""
    x = x.astype(jnp.float32)
    return x * cos + pltpu.roll(x, x.shape[1] // 2, 1) * sin
