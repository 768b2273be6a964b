"""Named rematerialisation policies for the scanned layers."""

from collections.abc import Callable

import flax.linen as nn
import jax

# Checkpoint names of the outputs of a layer's attention and MLP.
LAYER_OUTPUTS = ("attention_out", "mlp_out")

POLICIES: dict[str, Callable | None] = {
    "none": None,  # keeps every intermediate
    "outputs": jax.checkpoint_policies.save_only_these_names(*LAYER_OUTPUTS),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,  # keeps only the layers' inputs
}


def remat(layer: type[nn.Module], policy: str) -> type[nn.Module]:
    """Wraps a layer that is applied in `nn.scan` with a rematerialisation policy.

    Args:
      layer: Module class of the layer.
      policy: A key of `POLICIES`.

    Raises:
      ValueError: The policy is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown remat policy {policy!r}; known: {', '.join(POLICIES)}")
    if POLICIES[policy] is None:
        return layer
    # Common-subexpression elimination cannot undo rematerialisation inside a scan.
    return nn.remat(layer, policy=POLICIES[policy], prevent_cse=False)
