"""Named rematerialisation policies for the scanned layers."""

from collections.abc import Callable

import flax.linen as nn
import jax

# Marks what a layer's attention and MLP give back, so that a policy can name it.
LAYER_OUTPUTS = ("attention_out", "mlp_out")

POLICIES: dict[str, Callable | None] = {
    "none": None,  # keep every intermediate
    "outputs": jax.checkpoint_policies.save_only_these_names(*LAYER_OUTPUTS),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only the layers' inputs
}


def remat(layer: type[nn.Module], policy: str) -> type[nn.Module]:
    """`layer` under the named policy; inside a scan, so that common subexpressions cannot undo it."""
    if policy not in POLICIES:
        raise ValueError(f"unknown remat policy {policy!r}; known: {', '.join(POLICIES)}")
    if POLICIES[policy] is None:
        return layer
    return nn.remat(layer, policy=POLICIES[policy], prevent_cse=False)
