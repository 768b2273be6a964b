"""The state of a training run, its shapes, and where it lives on a mesh."""

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
    """Everything that a step changes.

    Attributes:
      step: [] int32, optimizer steps done.
      params: the whole tree, what learns and what does not.
      opt_state: of the optimizer, over what learns alone.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState


def new_state(optimizer: Optimizer, params: Any, param_dtype: DTypeLike = None, frozen_dtype: DTypeLike = None) -> Any:
    """A run's state at step 0; under `jit` with `out_shardings`, made where it will live.

    Args:
      optimizer: resolved for `params`.
      params: the starting weights.
      param_dtype: type of what learns, float32 if it is to take small steps; as it is by default.
      frozen_dtype: type of what does not; bfloat16 halves its memory. As it is by default.
    """

    def cast(leaf: jax.Array, learns: bool) -> jax.Array:
        dtype = param_dtype if learns else frozen_dtype
        keep = dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf if keep else leaf.astype(dtype)

    params = jax.tree.map(cast, params, optimizer.mask)
    return TrainState(jnp.zeros([], jnp.int32), params, optimizer.init(params))


def abstract_state(
    optimizer: Optimizer, params: Any, param_dtype: DTypeLike = None, frozen_dtype: DTypeLike = None
) -> TrainState:
    """Shapes and types of `new_state`, nothing allocated; `params` may be shapes."""
    return jax.eval_shape(lambda tree: new_state(optimizer, tree, param_dtype, frozen_dtype), params)


def state_shardings(state: TrainState, config: ModelConfig, mesh: Mesh) -> TrainState:
    """A tree of `NamedSharding`: parameters by the rules table, moments like their parameters, scalars everywhere.

    Args:
      state: arrays or shapes; adapters in `params` are placed with their kernels.
      config: sizes of the model that `params` are of.
      mesh: see `vl3_jax.parallel.mesh`.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = rules.shardings(state.params, adapter_axes(state.params, param_axes(config)), mesh)
    placed = flatten(params)
    shapes = {path: leaf.shape for path, leaf in flatten(state.params).items()}

    def place(path: str, leaf: Any) -> NamedSharding:
        # A moment's path ends in its parameter's: "1/mu/llm/norm/scale".
        parts = path.split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        owner = next((end for end in ends if shapes.get(end) == leaf.shape), None)
        return everywhere if owner is None else placed[owner]

    return TrainState(everywhere, params, map_paths(place, state.opt_state))
