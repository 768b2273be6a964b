"""Layers that are scanned, with named rematerialisation policies, or applied one after another."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.extend import core

POLICIES: dict[str, Callable | None] = {
    "none": None,  # keeps every intermediate
    "outputs": jax.checkpoint_policies.save_only_these_names("attention"),  # of the attention kernels
    "dots": jax.checkpoint_policies.save_only_these_names("attention", "product"),  # and of the linear layers
    "full": jax.checkpoint_policies.nothing_saveable,  # keeps only the layers' inputs
}


def scan_layers(layer: type[nn.Module], policy: str, length: int, in_axes) -> Callable[..., nn.Module]:
    """Stacks `length` layers in a scan, rematerialised with a named policy.

    Args:
      layer: Module class of the layer, (carry, *arguments) -> (carry, None).
      policy: A key of `POLICIES`.
      length: Number of layers.
      in_axes: Axes of the arguments that are scanned, or `nn.broadcast` for those that all layers share.

    Returns:
      The module class of the stack, whose parameters have a leading dimension `layers`.

    Raises:
      ValueError: The policy is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown remat policy {policy!r}; known: {', '.join(POLICIES)}")
    if POLICIES[policy] is not None:
        # Common-subexpression elimination cannot undo rematerialisation inside a scan.
        layer = nn.remat(layer, policy=POLICIES[policy], prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def apply_layer(layer: nn.Module, *arguments: Any) -> Any:
    """Applies one of several equal layers, which are traced and lowered once for all of them."""
    if layer.is_initializing():
        return layer(*arguments)
    return _apply_layer(layer.clone(parent=None, name=None), layer.variables["params"], *arguments)


@functools.partial(jax.jit, static_argnums=0)
def _apply_layer(layer: nn.Module, params: Any, *arguments: Any) -> Any:
    return layer.apply({"params": params}, *arguments)


def is_layer(equation: core.JaxprEqn) -> bool:
    """Returns whether an equation of a traced function is a call of `apply_layer`."""
    return equation.params.get("name") == "_apply_layer"
