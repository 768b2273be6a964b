"""Decode attention of one new token to a KV cache, by slots in use, against dense attention to all slots."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench.inputs import random_arrays
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.bench.timing import measure_case, temporaries
from vl3_jax.kernels.blockwise_decode import dense_decode_attention
from vl3_jax.kernels.decode_inputs import DecodeInputs
from vl3_jax.kernels.dispatch import decode_attention, decode_schedule_for
from vl3_jax.kernels.keys_values import KeysValues
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model.rope import rotary_table

DENSE = "dense"
_LAYERS = 4


def measure(settings: Settings) -> Table:
    """Measures caches of several sizes with a sixteenth, a quarter and all slots in use, for one row and several."""
    shapes = settings.pick([(2, 64)], [(1, 64), (1, 1024), (8, 1024), (1, 16_384)], [(1, 1024), (8, 16_384)])
    table_rows = [
        row
        for rows, slots in shapes
        for divisor in (16, 4, 1)
        for row in _measure_case(settings, rows, slots, slots // divisor)
    ]
    text = settings.config.text
    title = f"{_LAYERS} layers of {text.num_heads} heads of {text.head_dim} on {text.num_kv_heads}, {settings.dtype}"
    return Table("cache", title, table_rows)


def _measure_case(settings: Settings, rows: int, slots: int, used: int) -> list[Row]:
    inputs = _operands(settings, rows, slots, used)
    sides = {
        side: settings.compiled(functools.partial(_over_layers, attend), inputs)
        for side, attend in ((OURS, decode_attention), (DENSE, dense_decode_attention))
    }
    case = f"{rows} x {used:,} of {slots:,} slots"
    return measure_case(case, sides, settings.rounds, rows, "tokens", figures=temporaries(sides))


def _over_layers(attend: Callable, inputs: DecodeInputs) -> jax.Array:
    """Runs the attention of all layers one after another, as the decoder does."""

    def add_layer(layer: jax.Array, qkv: jax.Array) -> jax.Array:
        out, new = attend(inputs.replace(qkv=qkv, layer=layer))
        return jnp.concatenate([out, new], axis=-1)

    return jax.lax.fori_loop(0, _LAYERS, add_layer, inputs.qkv)


def _operands(settings: Settings, rows: int, slots: int, used: int) -> DecodeInputs:
    """Generates the operands of attention; the query is the newest of `used` tokens in each row."""
    text = settings.config.text
    cache = (_LAYERS, rows, text.num_kv_heads, slots, text.head_dim)
    channels = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    qkv, *cached = random_arrays(settings.dtype, (rows, 1, channels), cache, cache)
    positions = np.broadcast_to(np.arange(slots, dtype=np.int32), (rows, slots))
    q_info = SegmentInfo(jnp.ones((rows, 1), jnp.int32), jnp.full((rows, 1), used - 1, jnp.int32))
    kv_info = SegmentInfo((positions < used - 1).astype(np.int32), positions)
    rotary = rotary_table(q_info.positions, text.head_dim, text.rope_theta)
    keys_values = KeysValues(*cached)
    schedule = decode_schedule_for(q_info, kv_info, keys_values)
    return DecodeInputs(qkv, rotary, keys_values, jnp.int32(0), None, schedule, scale=text.head_dim**-0.5)
