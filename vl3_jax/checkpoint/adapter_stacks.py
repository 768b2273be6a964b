"""Adapters of PEFT folders beside their base model: stacked, for serving."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vl3_jax.checkpoint.hf_source import open_adapter
from vl3_jax.checkpoint.names import LeafSpec, name_map
from vl3_jax.checkpoint.peft_config import MERGE_BEFORE_LOADING
from vl3_jax.checkpoint.peft_merge import AdapterPairs
from vl3_jax.checkpoint.sources import fold_names, refuse_problems
from vl3_jax.errors import InputError
from vl3_jax.model.adapters import ADAPTERS, FUSED, AdapterStack
from vl3_jax.model.config import ModelConfig
from vl3_jax.model.quantize import contracted_dimensions
from vl3_jax.model.vl3 import param_axes
from vl3_jax.parallel.rules import Axis, shardings

_LAYERS = "llm/layers/"  # adapters of other modules do not stay apart


def load_adapters(
    folders: Mapping[str, str | os.PathLike],
    config: ModelConfig,
    *,
    dtype: Any,
    mesh: jax.sharding.Mesh | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Loads adapters onto devices.

    Each is padded with zeros to the largest rank that a kernel has in any of them and in any layer.

    Args:
      folders: PEFT folders or Hub ids by the name of the adapter.
      config: Configuration of the model.
      dtype: Type of the stacks.
      mesh: Mesh over which they are sharded as the kernels are.
      token: Hub token.

    Returns:
      Nested dict of `AdapterStack`s with the structure of the parameters for serving; empty without adapters.

    Raises:
      InputError: A folder holds no adapter, or one that does not fit the model, or one of other modules than the linear
        layers of the decoder.
    """
    if not folders:  # the shapes of the parameters take a while to find out
        return {}
    leaves = {path: leaf for path, leaf in name_map("official", config).leaves.items() if path.startswith(_LAYERS)}
    axes: Any = flatten_dict(param_axes(config), sep="/")
    adapters = [_checked(source, open_adapter(source, token), config) for source in folders.values()]
    loaded: dict[str, AdapterStack] = {}
    for path in _adapted(adapters, leaves):
        stack, names = _stack(leaves[path], adapters, dtype), _stack_axes(path, axes[path])
        module, name, _ = path.removeprefix(_LAYERS).split("/")
        for layer in range(config.text.num_layers):
            part = AdapterStack(stack.a[layer], stack.b[layer])
            loaded[f"llm/layers_{layer}/{module}/{ADAPTERS}/{name}"] = _placed(part, names, mesh)
    return unflatten_dict(loaded, sep="/")


def with_adapters(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters for serving with adapters beside their kernels."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(adapters))


def _placed(stack: AdapterStack, axes: AdapterStack, mesh: jax.sharding.Mesh | None) -> AdapterStack:
    return jax.device_put(stack, shardings(stack, axes, mesh) if mesh else jax.local_devices()[0])


def _checked(source: str | os.PathLike, pairs: AdapterPairs, config: ModelConfig) -> AdapterPairs:
    """Returns an adapter that fits the model; raises InputError for another."""
    names = name_map("official", config)
    refuse_problems(
        f"{os.fspath(source)}: the adapter does not fit the model",
        {
            "not in the model": [name for name in pairs if name not in names.tensors and name != "lm_head.weight"],
            "incomplete pair": pairs.incomplete,
            "wrong shape": pairs.wrong_shapes({name: spec.shape for name, spec in names.tensors.items()}),
        },
        "check the base",
    )
    others = [name for name in pairs if name not in names.tensors or not names.tensors[name].leaf.startswith(_LAYERS)]
    if others:
        raise InputError(f"{os.fspath(source)}: adapts {fold_names(others)}; {MERGE_BEFORE_LOADING}")
    return pairs


def _adapted(adapters: list[AdapterPairs], leaves: Mapping[str, LeafSpec]) -> Iterator[str]:
    """Yields the paths of the kernels that any adapter changes, and of those that are fused with them."""
    weights = {name for pairs in adapters for name in pairs}
    changed = {path for path, leaf in leaves.items() if any(spec.name in weights for spec in leaf.tensors)}
    for path in leaves:
        *parents, name, kind = path.split("/")
        group = next((group for group in FUSED if name in group), (name,))
        if any("/".join([*parents, part, kind]) in changed for part in group):
            yield path


def _stack(leaf: LeafSpec, adapters: list[AdapterPairs], dtype: Any) -> AdapterStack:
    """Returns all adapters of a kernel in all layers, [layers, adapters, ...], in memory of the host."""
    found = {
        (layer, number): pairs.factors(spec.name)
        for layer, spec in enumerate(leaf.tensors)
        for number, pairs in enumerate(adapters)
        if spec.name in pairs
    }
    rank = max((len(a) for a, _ in found.values()), default=1)
    in_shape, out_shape = _sides(leaf.path, leaf.shape)
    lead = len(leaf.tensors), len(adapters)
    stacked_a, stacked_b = np.zeros((*lead, *in_shape, rank), dtype), np.zeros((*lead, rank, *out_shape), dtype)
    for where, (a, b) in found.items():
        stacked_a[where][..., : len(a)] = a.T.reshape(*in_shape, -1)
        stacked_b[where][: len(a)] = b.T.reshape(-1, *out_shape)
    return AdapterStack(stacked_a, stacked_b)  # pyright: ignore[reportArgumentType]  # of the host


def _stack_axes(path: str, axes: tuple[Axis, ...]) -> AdapterStack:
    """Returns the logical axes of the adapters of one layer: those of the adapted kernel."""
    inputs, outputs = _sides(path, axes)
    return AdapterStack((None, *inputs, None), (None, None, *outputs))  # pyright: ignore[reportArgumentType]


def _sides(path: str, of_dimensions: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Returns what there is of the dimensions of a layer's input, and of those of its output, of a stacked kernel."""
    _, *of_layer = of_dimensions
    inputs = len(contracted_dimensions(path, len(of_layer)))
    return of_layer[:inputs], of_layer[inputs:]
