"""Matrix product with a kernel that is a plain array, int8-quantised, or extended by a LoRA adapter.

On a mesh whose `fsdp` axis splits both rows and kernels, a kernel is gathered whole before its product, and its
gradient is summed over the chips in float32 and scattered back. Left to itself the partitioner would cut the product
into the pieces of the kernel, and add each into the whole result.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from vl3_jax.kernels.einsum import einsum
from vl3_jax.model.quantize import QuantizedKernel
from vl3_jax.parallel.rules import current_mesh, mesh_axes, partition_spec
from vl3_jax.parallel.scatter import psum_scatter

Axes = tuple[str | None, ...]


@flax.struct.dataclass
class LoraKernel:
    """A kernel with a low-rank adapter (LoRA, arXiv 2106.09685), usable in place of a plain array.

    Attributes:
      base: The adapted kernel, [*in_shape, *out_shape]; frozen in training.
      a: Down-projection, [*in_shape, rank].
      b: Up-projection, [rank, *out_shape].
      scale: Factor of the product of `a` and `b`, alpha / rank.
    """

    base: jax.Array | QuantizedKernel
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the adapted kernel."""
        return self.base.shape


def linear(x: jax.Array, kernel: jax.Array | QuantizedKernel | LoraKernel, axes: Axes, num_in: int = 1) -> jax.Array:
    """Contracts the last `num_in` dimensions of `x` with the first `num_in` of `kernel`.

    Args:
      x: Input, [..., *in_shape].
      kernel: Kernel, [*in_shape, *out_shape], cast to the dtype of `x`. The product with a quantised kernel is scaled
        afterwards; the contribution of an adapter is added.
      axes: Logical axes of the kernel.
      num_in: Number of contracted dimensions.

    Returns:
      The product, [..., *out_shape] in the dtype of `x`.
    """
    if isinstance(kernel, LoraKernel):
        down = linear(x, kernel.a, (*axes[:num_in], None), num_in)
        return linear(x, kernel.base, axes, num_in) + kernel.scale * linear(down, kernel.b, (None, *axes[num_in:]))
    if isinstance(kernel, QuantizedKernel):
        product = _product(x, _gathered(kernel.values, axes).astype(x.dtype), num_in)
        return (product * kernel.scale.reshape(kernel.shape[num_in:])).astype(x.dtype)
    return _trainable_product(x, kernel, axes, num_in)


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias of the last dimensions; its gradient is summed in float32, by the matrix unit.

    Args:
      y: Output of a linear layer, [..., *out_shape].
      bias: The bias, [*out_shape], cast to the dtype of `y`.

    Returns:
      The sum, in the shape and dtype of `y`.
    """
    # Flat: in registers, heads of few channels take several times the room.
    flat = y.reshape(*y.shape[: y.ndim - bias.ndim], -1)
    return (flat + bias.astype(y.dtype).ravel()).reshape(y.shape)


def _add_bias_backward(bias: jax.Array, d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat = d_y.reshape(*d_y.shape[: d_y.ndim - bias.ndim], -1)
    # Several equal rows, because the compiler makes a slow sum of a product with one.
    ones = jnp.ones((8, *flat.shape[:-1]), flat.dtype)
    d_bias = einsum("n...,...o->no", ones, flat, out_dtype=jnp.float32)[0]
    return d_y, d_bias.reshape(bias.shape).astype(bias.dtype)


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), bias), _add_bias_backward)


def _product(x: jax.Array, matrix: jax.Array, num_in: int) -> jax.Array:
    shape = x.shape[: x.ndim - num_in]
    flat = x.reshape(*shape, math.prod(matrix.shape[:num_in]))
    product = einsum("...i,io->...o", flat, matrix.reshape(flat.shape[-1], -1))
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
    """Returns the gradient of a kernel, summed in float32 over all rows of all chips, in the sharding of the kernel."""
    shape, dtype, mesh = kernel.shape, kernel.dtype, current_mesh()

    def local(x: jax.Array, d_product: jax.Array) -> jax.Array:
        return einsum("...i,...o->io", x, d_product, out_dtype=jnp.float32).reshape(shape)

    row_axes = mesh_axes(partition_spec(("batch",), x.shape[:1], mesh)[0]) if mesh else ()
    if mesh is None or not row_axes:
        return local(x, d_product).astype(dtype)
    spec = PartitionSpec(*(_common(entry, row_axes) for entry in partition_spec(axes, shape, mesh)))

    def summed(x: jax.Array, d_product: jax.Array) -> jax.Array:
        gradient = local(x, d_product)
        for dimension, entry in enumerate(spec):
            for axis in entry or ():
                gradient = psum_scatter(gradient, axis, dimension)
        rest = tuple(axis for axis in row_axes if not any(axis in entry for entry in spec if entry))
        return (lax.psum(gradient, rest) if rest else gradient).astype(dtype)

    rows = PartitionSpec(row_axes)
    run = jax.shard_map(summed, in_specs=(rows, rows), out_specs=spec, axis_names=set(row_axes), check_vma=False)
    return run(x, d_product)


def _gathered(kernel: jax.Array, axes: Axes) -> jax.Array:
    """Returns a kernel that is whole along the mesh axes that split rows."""
    mesh = current_mesh()
    if mesh is None:
        return kernel
    spec = partition_spec(axes, kernel.shape, mesh)
    whole = PartitionSpec(*(_common(entry, ("tensor", "context")) for entry in spec))
    return kernel if whole == spec else lax.with_sharding_constraint(kernel, whole)


def _common(entry: str | tuple[str, ...] | None, axes: tuple[str, ...]) -> tuple[str, ...] | None:
    """Returns the mesh axes of one dimension that are among `axes`."""
    return tuple(axis for axis in mesh_axes(entry) if axis in axes) or None
