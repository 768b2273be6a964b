"""The part `attention`: attention alone over segments of equal lengths, beside cuDNN's and torch's.

Ours has all segments in one packed row; the others have them as a batch of rows.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench.gpu.cases import Case, Conditions, UnavailableError, seconds_per_call
from vl3_jax.bench.inputs import random_arrays, segment_info
from vl3_jax.bench.table import OURS
from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.dispatch import local_attention

_COMPARED = 1200  # first tokens whose results are compared with those of dense attention in float32
_DTYPE = "bfloat16"
Attend = Callable[[AttentionInputs], jax.Array]


class Shape(NamedTuple):
    """Attention within `count` segments of `length` tokens, each of H query and K key/value heads of D channels."""

    count: int
    length: int
    heads: int
    kv_heads: int
    width: int
    causal: bool

    @property
    def flops(self) -> int:
        """FLOPs of a forward pass over the allowed pairs."""
        pairs = self.length * (self.length + 1) // 2 if self.causal else self.length**2
        return 4 * self.count * pairs * self.heads * self.width


_FRAMES = [Shape(count, length, 16, 16, 72, False) for count, length in ((160, 256), (102, 400), (34, 1200))]
_TEXTS = [Shape(count, length, 12, 2, 128, True) for count, length in ((6, 2400), (1, 16_384))]
_SMALL = [Shape(3, 40, 2, 2, 24, False), Shape(2, 50, 4, 2, 32, True)]


class Side(NamedTuple):
    """An implementation with its operands.

    Attributes:
      call: Starts the work; gives the output and, with gradients, those of queries, keys and values.
      wait: Waits for what `call` gave.
      as_rows: Copies an array that `call` gave to the host, with axes rows, tokens, heads, channels.
    """

    call: Callable[[], Sequence[Any]]
    wait: Callable[[Any], Any]
    as_rows: Callable[[Any], np.ndarray]


def cases(conditions: Conditions) -> Iterator[Case]:
    """Lists all shapes, forward and with the backward pass, of one side after another."""
    sides = {OURS: _ours, "cuDNN": _cudnn, "torch": _torch}
    shapes = _SMALL if conditions.small else [*_FRAMES, *_TEXTS]
    for (side, build), shape, gradients in itertools.product(sides.items(), shapes, (False, True)):
        fields = {
            "side": side,
            "segments": f"{shape.count} x {shape.length:,} {'causal' if shape.causal else 'frames'}",
            "pass": "forward and backward" if gradients else "forward",
        }
        yield Case(fields, functools.partial(_measure, conditions, build, shape, gradients))


def _measure(
    conditions: Conditions,
    build: Callable[[Shape, bool], Side],
    shape: Shape,
    gradients: bool,
    figures: dict[str, Any],
) -> None:
    """Times a side, and compares output and gradient of the queries in the first segment with the exact ones."""
    side = build(shape, gradients)
    seconds = seconds_per_call(side.call, side.wait, conditions)
    figures["seconds"] = statistics.median(seconds)
    flops = shape.flops * (3 if gradients else 1)
    figures["tflops_per_second"] = flops / figures["seconds"] / 1e12
    if conditions.flops_per_second:
        figures["of_matrix_product"] = flops / figures["seconds"] / conditions.flops_per_second
    exact = exact_results(shape)
    pairs = [(side.as_rows(x)[0, : len(y)], y) for x, y in zip(side.call()[:2], exact, strict=False)]
    figures["deviation"] = max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)


@functools.lru_cache(maxsize=1)
def operands(shape: Shape) -> list[jax.Array]:
    """Generates queries, keys, values and the gradient of the output, with all segments in one row, [1, L, H, D]."""
    length = shape.count * shape.length
    q, kv = (1, length, shape.heads, shape.width), (1, length, shape.kv_heads, shape.width)
    return random_arrays(_DTYPE, q, kv, kv, q)


@functools.cache
def exact_results(shape: Shape) -> list[np.ndarray]:
    """Computes output and gradient of the queries of the first tokens in float32, [tokens, H, D] each.

    They need no later tokens: those of a frame are compared whole, and causal ones do not see them.
    """
    count = min(shape.length, _COMPARED)
    arrays = [x[:, :count].astype(jnp.float32) for x in operands(shape)]
    info = segment_info([count])
    return [np.asarray(x)[0] for x in jax.jit(_passes(dense_attention, shape, True))(info, *arrays)[:2]]


def _passes(attend: Attend, shape: Shape, gradients: bool) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns a function of segments, queries, keys, values and the gradient of the output."""

    def output(info, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(AttentionInputs(q, k, v, info, info, causal=shape.causal, scale=shape.width**-0.5))

    def run(info, q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> tuple[jax.Array, ...]:
        if not gradients:
            return (output(info, q, k, v),)
        out, pull_back = jax.vjp(functools.partial(output, info), q, k, v)
        return (out, *pull_back(d_out))

    return run


def _jax_side(attend: Attend, shape: Shape, gradients: bool, info, arrays: Sequence[jax.Array]) -> Side:
    run = jax.jit(_passes(attend, shape, gradients))
    return Side(lambda: run(info, *arrays), jax.block_until_ready, lambda x: np.asarray(x, np.float32))


def _ours(shape: Shape, gradients: bool) -> Side:
    info = segment_info([shape.length] * shape.count)
    return _jax_side(local_attention, shape, gradients, info, operands(shape))


def _cudnn(shape: Shape, gradients: bool) -> Side:
    if jax.default_backend() != "gpu":
        raise UnavailableError("cuDNN needs a GPU")

    def attend(inputs: AttentionInputs) -> jax.Array:
        return jax.nn.dot_product_attention(
            inputs.q, inputs.k, inputs.v, scale=inputs.scale, is_causal=inputs.causal, implementation="cudnn"
        )

    return _jax_side(attend, shape, gradients, None, _as_batch(shape))


def _as_batch(shape: Shape) -> list[jax.Array]:
    """Returns the operands with a row for each segment."""
    return [x.reshape(shape.count, shape.length, *x.shape[2:]) for x in operands(shape)]


def _torch(shape: Shape, gradients: bool) -> Side:
    try:
        import torch
    except ImportError as error:
        raise UnavailableError(f"without torch: {error}") from error
    platform = jax.default_backend()
    if platform not in ("cpu", "gpu") or (platform == "gpu" and not torch.cuda.is_available()):
        raise UnavailableError(f"torch has no {platform.upper()} here")
    device = "cuda" if platform == "gpu" else "cpu"
    arrays = [torch.tensor(np.asarray(x, np.float32)) for x in _as_batch(shape)]
    q, k, v, d_out = (x.to(device, torch.bfloat16).transpose(1, 2) for x in arrays)
    trained = [x.requires_grad_(gradients) for x in (q, k, v)]
    settings = {"is_causal": shape.causal, "scale": shape.width**-0.5, "enable_gqa": shape.heads != shape.kv_heads}

    def call() -> Sequence[Any]:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **settings)
        return (out, *torch.autograd.grad(out, trained, d_out)) if gradients else (out,)

    def wait(_) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return Side(call, wait, lambda x: x.detach().transpose(1, 2).float().cpu().numpy())
