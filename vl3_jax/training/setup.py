"""The computation of a run: model, optimizer, state and step on a mesh, and the rows of a step.

Nothing is allocated or compiled here, so a mesh of devices that do not exist can be planned for.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data_pipelines.inspection.statistics import row_lengths
from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.packing.packing_plan import packing_efficiency
from vl3_jax.errors import InputError
from vl3_jax.model import VideoLLaMA3, abstract_params
from vl3_jax.model.config import ModelConfig
from vl3_jax.parallel.rules import batch_shardings
from vl3_jax.processing.packed_batch import BatchShape, pack
from vl3_jax.training import lora
from vl3_jax.training.groups import flatten
from vl3_jax.training.optimizer import SCALINGS, Optimizer, make_optimizer
from vl3_jax.training.run_config import BatchConfig, RunConfig
from vl3_jax.training.state import TrainState, new_state, state_shardings
from vl3_jax.training.step import make_train_step

ROW_AXES = ("data", "fsdp")  # mesh axes that split the rows of a step


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """What a run computes.

    Attributes:
      mesh: Mesh of devices, or of their descriptions.
      model: Structure and numerics.
      optimizer: Optimizer of the parameters.
      init_state: Maps initial weights (without adapters) to the state at step 0.
      abstract_state: Shapes and types of the state, each with its sharding.
      step: Jitted function (state, batch) -> (state, metrics), see `make_train_step`.
    """

    mesh: Mesh
    model: VideoLLaMA3
    optimizer: Optimizer
    init_state: Callable[[Any], TrainState]
    abstract_state: TrainState
    step: Callable

    def first_state(self, load_params: Callable[[Any], Any]) -> TrainState:
        """Makes the state at step 0 where it will live; `load_params` maps shardings to the initial weights."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        params = load_params(lora.remove_adapters(shardings.params))
        return jax.jit(self.init_state, out_shardings=shardings, donate_argnums=0)(params)

    def compile_step(self, rows: int, shape: BatchShape) -> Callable:
        """Compiles the step for batches of one shape; to be called under `jax.set_mesh`."""
        return self.step.lower(self.abstract_state, abstract_batch(rows, shape, self.mesh)).compile()


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

    def adapted(params: Any) -> Any:
        settings = config.lora
        if not settings.rank:
            return params
        return lora.add_adapters(params, jax.random.key(config.seed), settings.patterns, settings.rank, settings.alpha)

    remat = config.remat
    model = VideoLLaMA3(model_config, jnp.dtype(config.dtype), jnp.dtype(config.param_dtype), remat.vision, remat.text)
    shapes = abstract_params(model_config, config.param_dtype)
    optimizer = make_optimizer(config.optimizer, jax.eval_shape(adapted, shapes), steps)

    def init_state(params: Any) -> TrainState:
        return new_state(optimizer, adapted(params), config.param_dtype, config.frozen_dtype)

    state = jax.eval_shape(init_state, shapes)
    shardings = state_shardings(state, model_config, mesh)
    step = make_train_step(
        model, optimizer, grad_accum_steps=grad_accum_steps(config.batch, mesh, rows), tasks=tasks, shardings=shardings
    )
    state = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), state, shardings)
    return TrainSetup(mesh, model, optimizer, init_state, state, step)


def abstract_batch(rows: int, shape: BatchShape, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and types of a packed batch, each with its sharding.

    Args:
      rows: Rows of a step on all hosts together.
      shape: Capacities of a row.
      mesh: Mesh of devices, or of their descriptions.
    """
    arrays = {
        name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype) for name, array in pack([[]], shape).items()
    }
    shardings = batch_shardings(arrays, mesh)
    return {name: array.update(sharding=shardings[name]) for name, array in arrays.items()}


def row_parts(config: BatchConfig, mesh: Mesh) -> int:
    """Returns what must divide the rows of a step: the parts of the mesh times the microbatches."""
    return (config.grad_accum_steps or 1) * math.prod(mesh.shape[axis] for axis in ROW_AXES)


def check_rows(config: BatchConfig, mesh: Mesh, rows: int) -> None:
    """Raises InputError where mesh and microbatches do not divide `rows`."""
    parts = row_parts(config, mesh)
    if rows % parts:
        split = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in ROW_AXES)
        raise InputError(
            f"{rows} rows of a step do not divide into {parts} parts (mesh {split}, grad_accum_steps "
            f"{config.grad_accum_steps or 1}); change batch.rows, mesh or batch.grad_accum_steps"
        )


def rows_for_samples(config: BatchConfig, mesh: Mesh, samples_per_row: float) -> int:
    """Returns the rows that hold about `config.samples` samples, as a multiple of `row_parts`."""
    parts = row_parts(config, mesh)
    return max(round(config.samples / samples_per_row / parts), 1) * parts


def grad_accum_steps(config: BatchConfig, mesh: Mesh, rows: int) -> int:
    """Returns the microbatches of a step, by default so many that each part of the mesh has one row at a time."""
    return config.grad_accum_steps or rows // row_parts(config, mesh)


def batch_note(config: RunConfig, samples: float) -> str:
    """Returns what to know about a step whose samples are not about those that the learning rates are meant for."""
    ratio, scaling = samples / config.batch.samples, config.optimizer.scale_with_batch
    if 0.8 < ratio < 1.25:
        return ""
    rates = "unchanged" if scaling == "none" else f"times {SCALINGS[scaling](ratio):.2f}"
    return (
        f", {ratio:.2f} times the {config.batch.samples} of batch.samples; learning rates {rates} "
        f"(optimizer.scale_with_batch={scaling})"
    )


def short_run_note(config: RunConfig, steps: int) -> str:
    """Returns a warning about a run that is warm-up for half of its steps or more; empty for a longer one."""
    warmup = config.optimizer.warmup_steps(steps)
    if 2 * warmup < steps > 1:
        return ""
    return (
        f"a run of so few steps ({steps}, of them {warmup} warm-up) learns next to nothing; make more of them with "
        "--config.epochs, or with fewer samples in each: --config.batch.samples"
    )


def overview(
    setup: TrainSetup, mixture: MixtureDataset, config: RunConfig, rows: int, samples: float, steps: int
) -> str:
    """Describes a run in several lines: sizes, and sharding and learning rate of each parameter.

    Args:
      setup: Computation of the run.
      mixture: Training data.
      config: Configuration of the run.
      rows: Rows of a step on all hosts together.
      samples: Samples of a step on average.
      steps: Number of optimizer steps in the whole run.
    """
    mesh, optimizer, state, shape = setup.mesh, setup.optimizer, setup.abstract_state, mixture.settings.shape
    plan = mixture.epoch_plan(config.seed, 0)
    efficiency = packing_efficiency(plan, mixture.sample_sizes, mixture.settings)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    memory = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    lines = [
        f"mesh      {axes}: {mesh.devices.size} x {mesh.devices.flat[0].device_kind}, {jax.process_count()} processes",
        f"data      {len(plan.samples):,} samples an epoch in {len(plan):,} rows of "
        f"{row_lengths(mixture.settings.lengths)} tokens and "
        f"{shape.patches * shape.vision_rows:,} patches, {efficiency.either:.0%} full",
        f"steps     {steps:,} of {rows} rows, about {samples:.0f} samples{batch_note(config, samples)}",
        f"memory    {memory / 2**30:.2f} GiB a device for parameters and optimizer",
        f"{'parameter':44} {'shape':>24} {'type':>9}  {'sharding':30} learning rate",
    ]
    groups, masks = flatten(optimizer.groups), flatten(optimizer.mask)
    for path, leaf in flatten(state.params).items():
        split = ", ".join("x".join(names) if isinstance(names, tuple) else names or "-" for names in leaf.sharding.spec)
        rate = f"{groups[path]} {optimizer.config.learning_rates[groups[path]]:.1e}" if masks[path] else "frozen"
        size = " x ".join(map(str, leaf.shape))
        lines.append(f"{path:44} {size:>24} {leaf.dtype.name:>9}  {split or 'replicated':30} {rate}")
    return "\n".join(lines)
