"""LoRA adapters beside the weights that they adapt: several at once, one chosen for each row.

They lie in the parameters for serving, beside the kernels of a module: `attn/adapters/{q,k,v,out}` and
`mlp/adapters/{gate,up,down}`. A tree without them computes nothing more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vl3_jax.kernels.einsum import einsum

ADAPTERS = "adapters"  # name of a module's adapters among its parameters
# Modules whose products serving computes as one: their adapters come together.
FUSED = (("q", "k", "v"), ("gate", "up"))


@flax.struct.dataclass
class AdapterStack:
    """The adapters of one kernel, those of a smaller rank padded with zeros.

    Attributes:
      a: Down-projections, [adapters, *in_shape, rank].
      b: Up-projections times their scale, [adapters, rank, *out_shape].
    """

    a: jax.Array
    b: jax.Array

    def product(self, x: jax.Array, adapter: jax.Array) -> jax.Array:
        """Returns what the adapter of each row adds to the product of its kernel.

        Args:
          x: Input of the kernel, [B, L, *in_shape], whose last dimensions may be one.
          adapter: Adapter of each row, [B] int32; below 0 for none.

        Returns:
          [B, L, *out_shape] float32.
        """
        count, rank, *out_shape = self.b.shape
        chosen = jnp.maximum(adapter, 0)
        a, b = (leaf[chosen].astype(x.dtype) for leaf in (self.a.reshape(count, -1, rank), self.b))
        flat = x.reshape(*x.shape[:2], -1)
        down = einsum("bli,bir->blr", flat, a, out_dtype=jnp.float32)
        down = jnp.where(adapter[:, None, None] < 0, 0, down).astype(x.dtype)
        up = einsum("blr,bro->blo", down, b.reshape(len(b), rank, -1), out_dtype=jnp.float32)
        return up.reshape(*x.shape[:2], *out_shape)


def add_adapter_products(
    module: nn.Module,
    product: jax.Array,
    x: jax.Array,
    adapter: jax.Array | None,
    names: Sequence[str],
    join: Callable[..., jax.Array] = lambda delta: delta,
) -> jax.Array:
    """Adds what adapters contribute to a product, if the parameters of the module have any of these names.

    Args:
      module: The module whose parameters hold the adapters.
      product: Product of `x`, [B, L, ...].
      x: Its input, [B, L, ...].
      adapter: Adapter of each row, [B] int32, below 0 for none; None for no row.
      names: The kernels that the product consists of.
      join: Joins their contributions, [B, L, *out_shape] each, as the product does.

    Returns:
      The sum, in the shape and dtype of `product`.
    """
    stacks: dict[str, Any] = {}
    if adapter is not None and module.has_variable("params", ADAPTERS):
        stacks = module.get_variable("params", ADAPTERS)
    if names[0] not in stacks:
        return product
    contribution = join(*(stacks[name].product(x, adapter) for name in names))  # pyright: ignore[reportArgumentType]
    return (product + contribution.reshape(product.shape)).astype(product.dtype)
