"""The part `peaks`: FLOP/s of a product of large matrices, and bytes/s of a copy."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from vl3_jax.bench.gpu.cases import Case, Conditions, seconds_per_call
from vl3_jax.bench.inputs import random_arrays
from vl3_jax.bench.timing import copy_bandwidth


def cases(conditions: Conditions) -> Iterator[Case]:
    """Lists two square matrices of bfloat16, and an array of which each value is read and written once."""
    size, nbytes = (256, 2**20) if conditions.small else (8192, 2**32)
    product = {"what": "matrix product", "size": size, "dtype": "bfloat16"}
    yield Case(product, functools.partial(_product, conditions, size))
    yield Case({"what": "copy", "bytes": nbytes}, functools.partial(_copy, nbytes))


def _product(conditions: Conditions, size: int, figures: dict[str, Any]) -> None:
    """Multiplies random numbers: of equal ones, a GPU multiplies more in a second than it ever does in a model."""
    a, b = random_arrays("bfloat16", (size, size), (size, size))
    product = jax.jit(jnp.matmul)
    figures["seconds"] = min(seconds_per_call(lambda: product(a, b), jax.block_until_ready, conditions))
    figures["flops_per_second"] = 2 * size**3 / figures["seconds"]


def _copy(nbytes: int, figures: dict[str, Any]) -> None:
    rate = copy_bandwidth(nbytes)
    figures |= {"seconds": 2 * nbytes / rate, "bytes_per_second": rate}
