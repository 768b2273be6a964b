"""The computation of a run: model, optimizer, state and step on a mesh.

Nothing is allocated or compiled here, so a mesh of devices that do not exist can be planned for.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vl3_jax.model import VideoLLaMA3, abstract_params
from vl3_jax.model.config import ModelConfig
from vl3_jax.training import lora
from vl3_jax.training.optimizer import Optimizer, make_optimizer
from vl3_jax.training.rows import grad_accum_steps
from vl3_jax.training.run_config import LoraConfig, RunConfig
from vl3_jax.training.state import TrainState, abstract_state, new_state, state_shardings
from vl3_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """What a run computes.

    Attributes:
      model: Structure and numerics.
      optimizer: Optimizer of the parameters.
      init_state: Maps initial weights (without adapters) to the state at step 0.
      abstract_state: Shapes and types of the state, each with its sharding.
      step: Compiled function (state, batch) -> (state, metrics), see `make_train_step`.
    """

    model: VideoLLaMA3
    optimizer: Optimizer
    init_state: Callable[[Any], TrainState]
    abstract_state: TrainState
    step: Callable

    @property
    def shardings(self) -> TrainState:
        """Sharding of each leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)


def build_train_setup(
    config: RunConfig, model_config: ModelConfig, mesh: Mesh, rows: int, steps: int, tasks: int
) -> TrainSetup:
    """Builds the computation of a run.

    Args:
      config: Configuration of the run.
      model_config: Sizes of the model.
      mesh: Mesh of devices, or of their descriptions.
      rows: Rows of a step on all hosts together.
      steps: Number of optimizer steps in the whole run.
      tasks: Number of tasks whose loss is reported apart.

    Raises:
      InputError: Groups, learning rates or adapters do not fit the model.
    """
    remat = config.remat
    model = VideoLLaMA3(model_config, jnp.dtype(config.dtype), jnp.dtype(config.param_dtype), remat.vision, remat.text)
    adapt = _add_adapters(config.lora, config.seed)
    shapes = jax.eval_shape(adapt, abstract_params(model_config, config.param_dtype))
    optimizer = make_optimizer(config.optimizer, shapes, steps)
    dtypes = {"param_dtype": config.param_dtype, "frozen_dtype": config.frozen_dtype}
    init_state = functools.partial(new_state, optimizer, **dtypes)
    state = abstract_state(optimizer, shapes, **dtypes)
    shardings = state_shardings(state, model_config, mesh)
    step = make_train_step(
        model, optimizer, grad_accum_steps=grad_accum_steps(config.batch, mesh, rows), tasks=tasks, shardings=shardings
    )
    return TrainSetup(
        model, optimizer, lambda params: init_state(adapt(params)), _with_shardings(state, shardings), step
    )


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def _add_adapters(config: LoraConfig, seed: int) -> Callable[[Any], Any]:
    """Returns the function that puts adapters into parameters, where there are to be any."""
    if not config.rank:
        return lambda params: params
    return lambda params: lora.add_adapters(params, jax.random.key(seed), config.patterns, config.rank, config.alpha)
