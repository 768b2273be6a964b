"""Products with matrices of narrower types: the values of float64, and on a CPU no wider copy of the matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.tolerances import REORDERED, relative_error
from vl3_jax.kernels.einsum import einsum, tied_product
from vl3_jax.kernels.int8_product import int8_product
from vl3_jax.model.lookup import lookup

WIDTH, OUT = 512, 8192
DTYPES = ("float32", "bfloat16")


def operands(rows, dtype, matrix_dtype, shape):
    rng = np.random.default_rng(0)
    matrix = rng.integers(-127, 128, shape) if matrix_dtype == "int8" else rng.standard_normal(shape)
    return jnp.asarray(rng.standard_normal(rows), dtype), jnp.asarray(matrix, matrix_dtype)


def temporaries(function, *arguments) -> int:
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(), (1,), (2, 3)], ids=str)
def test_tied_product(rows, dtype):
    x, table = operands((*rows, 96), dtype, "bfloat16", (40, 96))
    expected = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    assert relative_error(jax.jit(tied_product)(x, table), expected) <= REORDERED


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8])
def test_nothing_as_large_as_the_matrix_is_made(rows, dtype):
    """Also in a loop, which decodes, and out of which XLA moves what is the same in each step."""

    def repeated(step):
        return lambda x, matrix: jax.lax.fori_loop(0, 3, lambda i, x: x + step(i, x, matrix), x)

    def shrunk(product):
        return product.reshape(rows, -1, WIDTH).sum(1).astype(dtype)

    cases = {
        "int8": (lambda i, x, matrix: shrunk(int8_product(x, matrix, 1)), (OUT, WIDTH)),
        "bfloat16": (lambda i, x, table: shrunk(tied_product(x, table)), (OUT, WIDTH)),
        "embedding": (lambda i, x, table: lookup(table, jnp.full((rows, 1), i), dtype)[:, 0], (OUT, WIDTH)),
    }
    if dtype == "bfloat16" and rows > 1:
        cases["kernel"] = (lambda i, x, matrix: shrunk(einsum("ni,io->no", x, matrix)), (WIDTH, OUT))
    for name, (step, shape) in cases.items():
        x, matrix = operands((rows, WIDTH), dtype, "int8" if name == "int8" else "bfloat16", shape)
        assert temporaries(repeated(step), x, matrix) < matrix.size, name
