"""The state of a training run, its shapes, and its shardings on a mesh."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from vl3_jax.model import ModelConfig, param_axes
from vl3_jax.parallel import rules
from vl3_jax.training.groups import flatten, map_paths
from vl3_jax.training.lora import adapter_axes
from vl3_jax.training.optimizer import Optimizer


@flax.struct.dataclass
class TrainState:
    """Everything that a train step changes.

    Attributes:
      step: Number of completed optimizer steps, [] int32.
      params: The whole tree of parameters, trainable and frozen.
      opt_state: State of the optimizer, for the trainable parameters only.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState


def new_state(
    optimizer: Optimizer, params: Any, param_dtype: DTypeLike | None = None, frozen_dtype: DTypeLike | None = None
) -> TrainState:
    """Builds the state at step 0. Under `jit` with `out_shardings` it is created in its final sharding.

    Args:
      optimizer: Optimizer of `params`.
      params: Initial weights.
      param_dtype: Type of trainable floating-point parameters; float32 keeps small updates. None keeps their types.
      frozen_dtype: Type of frozen floating-point parameters; bfloat16 halves their memory. None keeps their types.
    """

    def cast(leaf: jax.Array, is_trainable: bool) -> jax.Array:
        dtype = param_dtype if is_trainable else frozen_dtype
        keep = dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf if keep else leaf.astype(dtype)

    params = jax.tree.map(cast, params, optimizer.mask)
    return TrainState(jnp.zeros([], jnp.int32), params, optimizer.init(params))


def state_shardings(state: TrainState, config: ModelConfig, mesh: Mesh) -> TrainState:
    """Returns the `NamedSharding` of each leaf of a state.

    Parameters follow the logical-axis rules, adapters the axes of their kernels, moments the sharding of their
    parameters; scalars are replicated.

    Args:
      state: Arrays or shapes.
      config: Configuration of the model.
      mesh: Mesh of devices or an abstract mesh.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    param_shardings = flatten(rules.shardings(state.params, adapter_axes(state.params, param_axes(config)), mesh))
    shapes = {path: leaf.shape for path, leaf in flatten(state.params).items()}

    def sharding_of(path: str, leaf: Any) -> NamedSharding:
        # Paths end in that of a parameter: "params/llm/norm/scale", "opt_state/1/mu/llm/norm/scale".
        keys = path.split("/")
        suffixes = ("/".join(keys[start:]) for start in range(len(keys)))
        owner = next((suffix for suffix in suffixes if shapes.get(suffix) == leaf.shape), None)
        return replicated if owner is None else param_shardings[owner]

    return map_paths(sharding_of, state)
