"""What a run computes, put together from its configuration: model, optimizer, state and step, on a mesh.

Nothing is allocated or compiled here, so that a mesh of devices which are not there can be planned for.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vl3_jax.model import VideoLLaMA3, abstract_params
from vl3_jax.model.config import ModelConfig
from vl3_jax.training import lora
from vl3_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from vl3_jax.training.rows import grad_accum_steps
from vl3_jax.training.state import TrainState, abstract_state, new_state, state_shardings
from vl3_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """A run's computation.

    Attributes:
      model: structure and numerics.
      optimizer: resolved for the parameters.
      fresh: starting weights (without adapters) -> the state at step 0.
      target: shapes and types of the state, each with its sharding.
      step: (state, batch) -> (state, metrics), see `make_train_step`.
    """

    model: VideoLLaMA3
    optimizer: Optimizer
    fresh: Callable[[Any], TrainState]
    target: TrainState
    step: Callable

    @property
    def shardings(self) -> TrainState:
        """Where the state lives."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.target)


def build_train_setup(
    config: ConfigDict, model_config: ModelConfig, mesh: Mesh, rows: int, steps: int, tasks: int
) -> TrainSetup:
    """Puts a run together.

    Args:
      config: from `training_config`.
      sizes: of the model.
      mesh: of devices, or of their descriptions.
      rows: of a step, on all hosts.
      steps: of the whole run, for the schedule.
      tasks: how many have a loss of their own.

    Raises:
      InputError: groups, rates or adapters that do not fit the model.
    """
    remat = config.remat
    model = VideoLLaMA3(model_config, jnp.dtype(config.dtype), jnp.dtype(config.param_dtype), remat.vision, remat.text)
    adapt = _adapters(config)
    shapes = jax.eval_shape(adapt, abstract_params(model_config, config.param_dtype))
    optimizer = make_optimizer(_optimizer_settings(config, steps), shapes)
    cast = functools.partial(new_state, optimizer, param_dtype=config.param_dtype, frozen_dtype=config.frozen_dtype)
    target = abstract_state(optimizer, shapes, config.param_dtype, config.frozen_dtype)
    shardings = state_shardings(target, model_config, mesh)
    parts = grad_accum_steps(config, mesh, rows)
    step = make_train_step(model, optimizer, grad_accum_steps=parts, tasks=tasks, shardings=shardings)
    return TrainSetup(model, optimizer, lambda params: cast(adapt(params)), _placed(target, shardings), step)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def _adapters(config: ConfigDict) -> Callable[[Any], Any]:
    """What puts adapters into parameters, where there are to be any."""
    if not config.lora.rank:
        return lambda params: params
    key = jax.random.key(config.seed)
    patterns = tuple(config.lora.patterns)
    return lambda params: lora.add_adapters(params, key, patterns, config.lora.rank, config.lora.alpha)


def _optimizer_settings(config: ConfigDict, steps: int) -> OptimizerConfig:
    chosen = config.optimizer
    return OptimizerConfig(
        learning_rates=dict(chosen.learning_rates),
        steps=steps,
        patterns=tuple(map(tuple, chosen.groups)),
        warmup_ratio=chosen.warmup_ratio,
        kind=chosen.kind,
        b1=chosen.b1,
        b2=chosen.b2,
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
        clip_norm=chosen.clip or None,
        mu_dtype=chosen.first_moment_dtype,
    )
