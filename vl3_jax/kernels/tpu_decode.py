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
from vl3_jax.kernels.decode_inputs import DecodeInputs, DecodeOutputs
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.keys_values import KeysValues
from vl3_jax.kernels.segment_info import round_up

_BLOCK_BYTES = 2**19  # of keys in a grid step: its copy takes longer than the step's fixed cost
_SUBLANES = 8


def tpu_decode_block(cached: KeysValues) -> int:
    """Returns how many slots a grid step processes at most, a power of two."""
    _, _, kv_heads, _, width = cached.keys.shape
    return 1 << max(_BLOCK_BYTES // (kv_heads * width * cached.keys.dtype.itemsize), LANES).bit_length() - 1


def tpu_decode_attention(inputs: DecodeInputs, interpret: bool = False) -> DecodeOutputs:
    """Equals `dense_decode_attention`; D must be a multiple of 128.

    Args:
      inputs: Operands of attention.
      interpret: Whether to interpret the kernel, which works on any device but is slow.
    """
    qkv, cached, schedule, group = inputs.qkv, inputs.keys_values, inputs.schedule, inputs.group
    rows, length, _ = qkv.shape
    _, _, kv_heads, _, width = cached.keys.shape
    block = schedule.block

    def row_index(b, step, *_):
        return b, 0, 0

    def block_number(b, step, order, count):
        return order[b, jnp.minimum(step, jnp.maximum(count[b] - 1, 0))]

    def allowed_index(b, step, layer, cache_rows, order, count):
        return b, 0, block_number(b, step, order, count)

    def cache_index(b, step, layer, cache_rows, order, count):
        row = b if inputs.rows is None else cache_rows[b]
        return layer[0], row, 0, block_number(b, step, order, count), 0

    def scales_index(*indices):
        return cache_index(*indices)[:-1]

    cache_spec = pl.BlockSpec((None, None, kv_heads, block, width), cache_index)
    scales_spec = pl.BlockSpec((None, None, kv_heads, block), scales_index)
    scales = () if cached.key_scales is None else (cached.key_scales, cached.value_scales)
    queries = length * round_up(group, _SUBLANES)
    sizes = kv_heads * group * width, kv_heads * 2 * width  # of the results

    def row_spec(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, length, size), row_index)

    # Single tokens of several rows share registers, as the product leaves them; to part them would take a copy.
    together = _SUBLANES if rows % _SUBLANES == 0 else rows
    qkv_spec = row_spec(qkv.shape[2])
    if length == 1:
        qkv = qkv[:, 0]
        qkv_spec = pl.BlockSpec((together, qkv.shape[1]), lambda b, step, *_: (b // together, 0))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(rows, jnp.maximum(schedule.count.max(), 1)),
        in_specs=[
            qkv_spec,
            row_spec(width),
            row_spec(length),
            pl.BlockSpec((None, length, block), allowed_index),
            cache_spec,
            cache_spec,
            *[scales_spec for _ in scales],
        ],
        out_specs=[row_spec(size) for size in sizes],
        scratch_shapes=[pltpu.VMEM((kv_heads, queries, width), qkv.dtype)]
        + [pltpu.VMEM((kv_heads, queries, size), jnp.float32) for size in (1, 1, width)],
    )
    results = pl.pallas_call(
        functools.partial(_kernel, group=group, scale=inputs.scale, scaled=bool(scales)),
        grid_spec=grid_spec,
        out_shape=[jax.ShapeDtypeStruct((rows, length, size), qkv.dtype) for size in sizes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_kernel",
    )(
        inputs.layer[None],
        schedule.count if inputs.rows is None else inputs.rows,  # not read where they are the same
        schedule.order,
        schedule.count,
        qkv,
        inputs.rotary,
        schedule.allowed_new,
        schedule.allowed,
        cached.keys,
        cached.values,
        *scales,
    )
    return DecodeOutputs(*results)


def tpu_decode_unsupported_reason(inputs: DecodeInputs) -> str | None:
    """Returns why the kernel does not support these operands, in a few words; None if it does."""
    slots, width = inputs.keys_values.keys.shape[3:]
    if width % LANES:
        return f"heads of {width} channels, not a multiple of {LANES}"
    if inputs.schedule.block % LANES and inputs.schedule.block != slots:
        return f"a cache of {slots} slots, which has no blocks of a multiple of {LANES}"
    return None


def _kernel(
    layer, cache_rows, order, count, qkv, rotary, allowed_new, allowed, keys, values, *refs, group, scale, scaled
):
    """Processes one block of slots of a row, and before the first one the new tokens.

    `qkv` is [L, K * (G + 2) * D], or [rows, ...] of single tokens of several rows, the rotary table [L, D],
    `allowed_new` [L, L] and `allowed` [L, block]; keys and values are [K, block, D] and have scales of [K, block] if they
    are int8. Then come the fields of `DecodeOutputs`, and in VMEM the rotated queries, [K, L * G, D] where G is padded,
    and the fields of an `OnlineSoftmaxState`.
    """
    key_scales, value_scales = refs[:2] if scaled else (None, None)
    out, new, queries, *state_refs = refs[2 * scaled :]
    row, step = pl.program_id(0), pl.program_id(1)
    (kv_heads, query_rows, width), length = queries.shape, allowed.shape[0]
    padded_group = query_rows // length

    def of_queries(rows: jax.Array) -> jax.Array:
        """Repeats the row of each token for its queries, [L, n] -> [L * G, n]."""
        parts = [jnp.broadcast_to(rows[i : i + 1], (padded_group, rows.shape[1])) for i in range(length)]
        return jnp.concatenate(parts) if length > 1 else parts[0]

    def add(head: int, scores, mask, values, equation, value_scales=None):
        state = online_softmax.OnlineSoftmaxState(*(ref[head] for ref in state_refs))
        state = online_softmax.update(state, scores, mask, values, equation, value_scales)
        for ref, value in zip(state_refs, state, strict=True):
            ref[head] = value

    def heads_of(array, head: int):
        """Returns where a head lies, [L, D]."""
        return array.at[:, pl.ds(head * width, width)]

    def part(index: int) -> jax.Array:
        """Returns a query, key or value of the tokens, [L, D] float32."""
        found = heads_of(qkv, index)[...].astype(jnp.float32)
        if length > 1:
            return found
        is_own = jax.lax.broadcasted_iota(jnp.int32, found.shape, 0) == jax.lax.rem(row, qkv.shape[0])
        return jnp.where(is_own, found, 0.0).sum(0, keepdims=True)

    @pl.when(step == 0)
    def _():
        for ref, value in zip(state_refs, online_softmax.init(queries.shape), strict=True):
            ref[...] = value
        queries[...] = jnp.zeros(queries.shape, queries.dtype)
        factors = _factors(rotary[...])
        mask = of_queries(allowed_new[...]) != 0
        for head in range(kv_heads):
            first = head * (group + 2)
            for member in range(group):
                rotated = _rotated(part(first + member), *factors).astype(queries.dtype)
                for token in range(length):
                    queries[head, pl.ds(token * padded_group + member, 1)] = rotated[token : token + 1]
            key = _rotated(part(first + group), *factors).astype(new.dtype)
            value = part(first + group + 1).astype(new.dtype)
            heads_of(new, 2 * head)[...], heads_of(new, 2 * head + 1)[...] = key, value
            for token in range(length):
                products = queries[head].astype(jnp.float32) * key[token : token + 1].astype(jnp.float32)
                scores = products.sum(-1, keepdims=True) * scale
                add(head, scores, mask[:, token : token + 1], value[token : token + 1], None)

    @pl.when(step < count[row])
    def _():
        mask = of_queries(allowed[...]) != 0
        for head in range(kv_heads):
            head_keys = keys[head].astype(qkv.dtype)
            scores = einsum("rd,sd->rs", queries[head], head_keys, out_dtype=jnp.float32) * scale
            if key_scales is not None:
                scores *= key_scales[head : head + 1]
            value_scale = None if value_scales is None else value_scales[head : head + 1]
            add(head, scores, mask, values[head].astype(qkv.dtype), "rs,sd->rd", value_scale)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        for head in range(kv_heads):
            state = online_softmax.OnlineSoftmaxState(*(ref[head] for ref in state_refs))
            result = online_softmax.finalize(state)[0].astype(out.dtype)
            for member in range(group):
                own = [result[i : i + 1] for i in range(member, query_rows, padded_group)]
                heads_of(out, head * group + member)[...] = jnp.concatenate(own) if length > 1 else own[0]


def _factors(table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns by what a channel and its partner are multiplied, [L, D] each, from a rotary table."""
    half = table.shape[1] // 2
    is_first = jax.lax.broadcasted_iota(jnp.int32, table.shape, 1) < half
    swapped = pltpu.roll(table, half, 1)
    return jnp.where(is_first, table, swapped), jnp.where(is_first, -swapped, table)


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the channels of heads, [rows, D] float32."""
    return x * cos + pltpu.roll(x, x.shape[1] // 2, 1) * sin
