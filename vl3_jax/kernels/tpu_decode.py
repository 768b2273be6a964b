"""A few queries against a cache, for TPUs: one Pallas kernel over the blocks of slots in use.

A visit sees all heads of a row. Slots and key heads lie together on one axis, as they do in memory, and queries of
other groups are masked: the matrix unit is idle otherwise, and no key is ever moved but from HBM to VMEM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vl3_jax.kernels.blockwise_decode import largest_block, used_blocks
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.online_softmax import OnlineSoftmaxState, finalize, init, update
from vl3_jax.kernels.segment_info import SegmentInfo

BLOCK = 512  # slots
LANES = 128  # of a vector register


def tpu_decode_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    q_info: SegmentInfo,
    kv_info: SegmentInfo,
    *,
    causal: bool,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Same contract as `blockwise_decode_attention`; D is a whole number of 128."""
    rows, length, heads, width = q.shape
    layers, _, slots, kv_heads, _ = keys.shape
    block = largest_block(slots, BLOCK)
    order, count = used_blocks(q_info, kv_info, block, causal)
    q_rows = q.swapaxes(1, 2).reshape(rows, heads * length, width)
    q_rows_labels = jnp.tile(jnp.stack(q_info, axis=-1), (1, heads, 1))
    kv_columns = jnp.repeat(jnp.stack(kv_info, axis=1), kv_heads, axis=-1)
    keys, values = (x.reshape(layers, rows, slots * kv_heads, width) for x in (keys, values))

    def whole(b, step, *_):
        return b, 0, 0

    def visited(b, step, layer, order, count):
        return layer[0], b, order[b, jnp.minimum(step, jnp.maximum(count[b] - 1, 0))], 0

    def visited_labels(b, step, *scalars):
        return b, 0, visited(b, step, *scalars)[2]

    columns = block * kv_heads
    cache = pl.BlockSpec((None, None, columns, width), visited)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(rows, jnp.maximum(count.max(), 1)),
        in_specs=[
            pl.BlockSpec((None, heads * length, width), whole),
            pl.BlockSpec((None, heads * length, 2), whole),
            pl.BlockSpec((None, 2, columns), visited_labels),
            cache,
            cache,
        ],
        out_specs=pl.BlockSpec((None, heads * length, width), whole),
        scratch_shapes=[pltpu.VMEM((heads * length, size), jnp.float32) for size in (1, 1, width)],
    )
    kernel = functools.partial(_kernel, kv_heads=kv_heads, causal=causal, scale=scale)
    out = pl.pallas_call(
        kernel,
        grid_spec=spec,
        out_shape=jax.ShapeDtypeStruct(q_rows.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_kernel",
    )(layer[None], order, count, q_rows, q_rows_labels, kv_columns, keys, values)
    return out.reshape(rows, heads, length, width).swapaxes(1, 2)


def tpu_decode_unsupported_reason(q: jax.Array, keys: jax.Array) -> str | None:
    """Why the kernel does not take these operands, in a few words; None if it does."""
    slots, kv_heads, width = keys.shape[2:]
    if width % LANES:
        return f"heads of {width} channels, not whole numbers of {LANES}"
    if largest_block(slots, BLOCK) * kv_heads % LANES:
        return f"a cache of {slots} slots, of no blocks of {LANES} keys"
    return None


def _kernel(layer, order, count, q, q_info, kv_info, keys, values, out, *state, kv_heads, causal, scale):
    """One visit: queries [H * L, D], keys and values [block * K, D]; state is a `OnlineSoftmaxState` in VMEM."""
    row, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _():
        for ref, start in zip(state, init(q.shape), strict=True):
            ref[...] = start

    @pl.when(step < count[row])
    def _():
        scores = einsum("rd,sd->rs", q[...], keys[...].astype(q.dtype), out_dtype=jnp.float32) * scale
        group = q.shape[0] // kv_heads
        heads, kv_columns = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        segment_ids, positions = q_info[:, 0:1], q_info[:, 1:2]
        allowed = (segment_ids == kv_info[0:1]) & (segment_ids > 0) & (heads // group == kv_columns % kv_heads)
        if causal:
            allowed &= kv_info[1:2] <= positions
        new = update(
            OnlineSoftmaxState(*(ref[...] for ref in state)), scores, allowed, values[...].astype(q.dtype), "rs,sd->rd"
        )
        for ref, value in zip(state, new, strict=True):
            ref[...] = value

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out[...] = finalize(OnlineSoftmaxState(*(ref[...] for ref in state)))[0].astype(out.dtype)
