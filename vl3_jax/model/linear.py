"""Matrix product with a kernel that is a plain array, int8-quantised, or extended by a LoRA adapter.

On a mesh whose `fsdp` axis splits both rows and kernels, a kernel is gathered whole before its product, and its
gradient is summed over the chips in float32 and scattered back. Left to itself the partitioner would cut the product
into the pieces of the kernel, and add each into the whole result.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from vl3_jax.kernels.einsum import einsum, sum_outer, with_full_registers
from vl3_jax.kernels.int8_product import int8_product
from vl3_jax.model.quantize import QuantizedKernel
from vl3_jax.parallel.rules import Axis, current_mesh, mesh_axes, partition_spec, target_device
from vl3_jax.parallel.scatter import psum_scatter

Axes = tuple[Axis, ...]


@flax.struct.dataclass
class LoraKernel:
    """A kernel with a low-rank adapter (LoRA, arXiv 2106.09685), usable in place of a plain array.

    Attributes:
      base: The adapted kernel, [*in_shape, *out_shape]; frozen in training.
      a: Down-projection, [*in_shape, rank].
      b: Up-projection, [rank, *out_shape].
      scale: Factor of the product of `a` and `b`, alpha / rank.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the adapted kernel."""
        return self.base.shape


def linear(
    x: jax.Array,
    kernel: jax.Array | QuantizedKernel | LoraKernel,
    axes: Axes,
    num_in: int = 1,
    transposed: bool = False,
) -> jax.Array:
    """Contracts the last `num_in` dimensions of `x` with the first `num_in` of `kernel`.

    Args:
      x: Input, [..., *in_shape].
      kernel: Kernel, [*in_shape, *out_shape], cast to the dtype of `x`. The product with a quantised kernel is scaled
        afterwards; the contribution of an adapter is added.
      axes: Logical axes of the kernel.
      num_in: Number of contracted dimensions.
      transposed: Whether the kernel is a matrix [out, in], as the output head of tied embeddings is: where it has more
        outputs than inputs, a TPU would transpose another one before each product. Its gradient is not made for meshes.

    Returns:
      The product, [..., *out_shape] in the dtype of `x`.
    """
    return with_full_registers(lambda x: _any_product(x, kernel, axes, num_in, transposed), x, num_in)


def _any_product(
    x: jax.Array, kernel: jax.Array | QuantizedKernel | LoraKernel, axes: Axes, num_in: int, transposed: bool
) -> jax.Array:
    """Implements `linear`."""
    if isinstance(kernel, QuantizedKernel):
        return _int8_product(x, kernel, axes if transposed else (*axes[num_in:], *axes[:num_in]), num_in)
    if transposed:
        assert not isinstance(kernel, LoraKernel)
        return _rows_product(x, _gathered(kernel.astype(x.dtype), axes), "oi")
    if isinstance(kernel, LoraKernel):
        down = linear(x, kernel.a, (*axes[:num_in], None), num_in)
        return linear(x, kernel.base, axes, num_in) + kernel.scale * linear(down, kernel.b, (None, *axes[num_in:]))
    return checkpoint_name(_trainable_product(x, kernel, axes, num_in), "product")


def _int8_product(x: jax.Array, kernel: QuantizedKernel, axes: Axes, num_in: int) -> jax.Array:
    """Returns the product with a quantised kernel; `axes` are those of its values."""
    is_split = any(_gathered_spec(kernel.values, axes)[-num_in:])
    product = int8_product(x, _gathered(kernel.values, axes), num_in, whole_inputs=not is_split)
    return (product * kernel.scale.squeeze(range(-num_in, 0))).astype(x.dtype)


def add_bias(y: jax.Array, bias: jax.Array, axes: Axes) -> jax.Array:
    """Adds a bias of the last dimensions.

    Args:
      y: Output of a linear layer, [..., *out_shape].
      bias: The bias, [*out_shape], cast to the dtype of `y`. Its gradient is summed in float32, by the matrix unit.
      axes: Logical axes of the bias.

    Returns:
      The sum, in the shape and dtype of `y`.
    """
    return _trainable_sum(y, bias, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _trainable_sum(y: jax.Array, bias: jax.Array, axes: Axes) -> jax.Array:
    # Flat: in registers, heads of few channels take several times the space.
    return (_flat(y, bias) + bias.astype(y.dtype).ravel()).reshape(y.shape)


def _add_bias_forward(y, bias, axes):
    return _trainable_sum(y.value, bias.value, axes), (bias.value, () if bias.perturbed else None)


def _add_bias_backward(axes, residuals, d_y):
    bias, wanted = residuals
    if isinstance(d_y, jax.custom_derivatives.SymbolicZero):
        return None, None

    def local(d_y: jax.Array) -> jax.Array:
        # Several equal rows, because the compiler makes a slow sum of a product with one.
        ones = jnp.ones((8, *d_y.shape[:-1]), d_y.dtype)
        return einsum("n...,...o->no", ones, d_y, out_dtype=jnp.float32)[0].reshape(bias.shape)

    return d_y, None if wanted is None else _sum_over_rows(local, [_flat(d_y, bias)], bias, axes)


_trainable_sum.defvjp(_add_bias_forward, _add_bias_backward, symbolic_zeros=True)


def _flat(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y.reshape(*y.shape[: y.ndim - bias.ndim], -1)


def _rows_product(x: jax.Array, matrix: jax.Array, matrix_axes: str = "io") -> jax.Array:
    if x.size == x.shape[-1] and x.dtype == jnp.bfloat16 and target_device().platform == "cpu":
        # With one row, XLA would multiply a copy of the matrix in float32.
        rows = jnp.concatenate([x.reshape(1, -1), jnp.zeros((1, x.size), x.dtype)])
        return einsum(f"ni,{matrix_axes}->no", rows, matrix)[0].reshape(*x.shape[:-1], -1)
    return einsum(f"...i,{matrix_axes}->...o", x, matrix)


def _product(x: jax.Array, matrix: jax.Array, num_in: int) -> jax.Array:
    shape = x.shape[: x.ndim - num_in]
    flat = x.reshape(*shape, math.prod(matrix.shape[:num_in]))
    product = _rows_product(flat, matrix.reshape(flat.shape[-1], -1))
    return product.reshape(*shape, *matrix.shape[num_in:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _trainable_product(x: jax.Array, kernel: jax.Array, axes: Axes, num_in: int) -> jax.Array:
    return _product(x, _gathered(kernel.astype(x.dtype), axes), num_in)


def _forward(x, kernel, axes, num_in):
    # Which operands are trainable must be static in the backward pass; the pytree structure of the residuals (an empty
    # tuple or None) carries it there.
    wanted = tuple(() if operand.perturbed else None for operand in (x, kernel))
    return _trainable_product(x.value, kernel.value, axes, num_in), (x.value, kernel.value, wanted)


def _backward(axes, num_in, residuals, d_product):
    x, kernel, (x_wanted, kernel_wanted) = residuals
    if isinstance(d_product, jax.custom_derivatives.SymbolicZero):
        return None, None
    shape = x.shape
    rows, width = shape[: x.ndim - num_in], math.prod(kernel.shape[:num_in])
    x, d_product = x.reshape(*rows, width), d_product.reshape(*rows, -1)
    d_x = None
    if x_wanted is not None:
        matrix = _gathered(kernel.astype(x.dtype), axes).reshape(width, -1)
        d_x = einsum("...o,io->...i", d_product, matrix).reshape(shape)
    return d_x, None if kernel_wanted is None else _kernel_gradient(x, d_product, kernel, axes)


_trainable_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _kernel_gradient(x: jax.Array, d_product: jax.Array, kernel: jax.Array, axes: Axes) -> jax.Array:
    """Returns the gradient of a kernel, in its dtype and sharding."""

    def local(x: jax.Array, d_product: jax.Array) -> jax.Array:
        return sum_outer(x, d_product).reshape(kernel.shape)

    return _sum_over_rows(local, [x, d_product], kernel, axes)


def _sum_over_rows(local: Callable, arrays: Sequence[jax.Array], parameter: jax.Array, axes: Axes) -> jax.Array:
    """Sums gradients of a parameter over the rows of all chips.

    Args:
      local: Computes the gradient over a chip's rows of `arrays`, in float32.
      arrays: Arrays whose first dimension is that of rows.
      parameter: The parameter, of which shape and dtype are read.
      axes: Its logical axes.

    Returns:
      The sum, in the dtype and sharding of the parameter.
    """
    shape, dtype, mesh = parameter.shape, parameter.dtype, current_mesh()
    row_axes = mesh_axes(partition_spec(("batch",), arrays[0].shape[:1], mesh)[0]) if mesh else ()
    if mesh is None or not row_axes:
        return local(*arrays).astype(dtype)
    spec = PartitionSpec(*(_common(entry, row_axes) for entry in partition_spec(axes, shape, mesh)))

    def summed(*arrays: jax.Array) -> jax.Array:
        gradient = local(*arrays)
        for dimension, entry in enumerate(spec):
            for axis in mesh_axes(entry):
                gradient = psum_scatter(gradient, axis, dimension)
        rest = tuple(axis for axis in row_axes if not any(axis in mesh_axes(entry) for entry in spec))
        return (lax.psum(gradient, rest) if rest else gradient).astype(dtype)

    rows = PartitionSpec(row_axes)
    return jax.shard_map(summed, in_specs=rows, out_specs=spec, axis_names=set(row_axes), check_vma=False)(*arrays)


def _gathered(kernel: jax.Array, axes: Axes) -> jax.Array:
    """Returns a kernel that is whole along the mesh axes that split rows."""
    mesh = current_mesh()
    if mesh is None:
        return kernel
    spec, whole = partition_spec(axes, kernel.shape, mesh), _gathered_spec(kernel, axes)
    return kernel if whole == spec else lax.with_sharding_constraint(kernel, whole)


def _gathered_spec(kernel: jax.Array, axes: Axes) -> PartitionSpec:
    """Returns the sharding of a kernel that `_gathered` has made."""
    mesh = current_mesh()
    spec = PartitionSpec() if mesh is None else partition_spec(axes, kernel.shape, mesh)
    return PartitionSpec(*(_common(entry, ("tensor", "context")) for entry in spec))


def _common(entry: str | tuple[str, ...] | None, axes: tuple[str, ...]) -> tuple[str, ...] | None:
    """Returns the mesh axes of one dimension that are among `axes`."""
    return tuple(axis for axis in mesh_axes(entry) if axis in axes) or None
