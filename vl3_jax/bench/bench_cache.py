"""Attention of one new token to a cache, by slots in use: read in place, beside dense attention to all slots."""

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.bench.timing import in_turns
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.dispatch import decode_attention
from vl3_jax.kernels.segment_info import SegmentInfo

DENSE = "dense"
_LAYERS = 4


def measure(settings: Settings) -> Table:
    """Caches from tiny to long, a sixteenth, a quarter and all of them in use, by one row and by several."""
    shapes = settings.pick([(2, 64)], [(1, 64), (1, 1024), (8, 1024), (1, 16_384)], [(1, 1024), (8, 16_384)])
    rows = [
        row for count, slots in shapes for part in (16, 4, 1) for row in _rows(settings, count, slots, slots // part)
    ]
    text = settings.config.text
    title = f"{_LAYERS} layers of {text.num_heads} heads of {text.head_dim} on {text.num_kv_heads}, {settings.dtype}"
    return Table("cache", title, rows)


def _rows(settings: Settings, count: int, slots: int, used: int) -> list[Row]:
    operands = _operands(settings, count, slots, used)
    sides = {
        OURS: settings.compiled(_over_layers(decode_attention), *operands),
        DENSE: settings.compiled(_over_layers(_dense), *operands),
    }
    seconds = in_turns(sides, settings.rounds)
    case = f"{count} x {used:,} of {slots:,} slots"
    return [
        Row(case, side, seconds[side], count, "tokens", None, {"temporaries MB": run.temporaries / 1e6})
        for side, run in sides.items()
    ]


def _dense(q, keys, values, layer, q_info, kv_info, *, causal, scale):
    k, v = (x[layer].astype(q.dtype) for x in (keys, values))
    return dense_attention(q, k, v, q_info, kv_info, causal=causal, scale=scale)


def _over_layers(attend):
    """All layers, one after another, as the decoder runs them."""

    def run(q, keys, values, q_info, kv_info):
        def one(layer, q):
            return attend(q, keys, values, layer, q_info, kv_info, causal=True, scale=q.shape[-1] ** -0.5)

        return jax.lax.fori_loop(0, keys.shape[0], one, q)

    return run


def _operands(settings: Settings, count: int, slots: int, used: int) -> tuple:
    """`count` rows whose newest of `used` tokens asks."""
    text = settings.config.text
    keys = jax.random.split(jax.random.key(0), 3)
    cache = (_LAYERS, count, slots, text.num_kv_heads, text.head_dim)
    shapes = [(count, 1, text.num_heads, text.head_dim), cache, cache]
    arrays = [jax.random.normal(key, shape, settings.dtype) for key, shape in zip(keys, shapes, strict=True)]
    position = np.broadcast_to(np.arange(slots, dtype=np.int32), (count, slots))
    q_info = SegmentInfo(jnp.ones((count, 1), jnp.int32), jnp.full((count, 1), used - 1, jnp.int32))
    return *arrays, q_info, SegmentInfo((position < used).astype(np.int32), position)
