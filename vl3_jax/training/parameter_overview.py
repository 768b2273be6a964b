"""The overview that a run prints before its first step: sizes, and sharding and learning rate of each parameter."""

import math
from typing import Any

import jax
from jax.sharding import Mesh

from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.packing import packing_efficiency
from vl3_jax.training.groups import flatten
from vl3_jax.training.setup import TrainSetup


def parameter_overview(mesh: Mesh, mixture: MixtureDataset, setup: TrainSetup, seed: int, rows: int, steps: int) -> str:
    """Describes a run in several lines.

    Args:
      mesh: Mesh of the run.
      mixture: Training data.
      setup: Computation of the run.
      seed: Seed of the order of samples.
      rows: Rows of a step on all hosts together.
      steps: Number of optimizer steps in the whole run.
    """
    optimizer, state = setup.optimizer, setup.abstract_state
    shape = mixture.settings.shape
    plan = mixture.epoch_plan(seed, 0)
    efficiency = packing_efficiency(plan, mixture.sample_sizes, shape)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    lines = [
        f"mesh      {axes}: {mesh.devices.size} x {mesh.devices.flat[0].device_kind}, {jax.process_count()} processes",
        f"data      {len(plan.samples):,} samples an epoch in {len(plan):,} rows of {shape.length:,} tokens and "
        f"{shape.patches * shape.vision_rows:,} patches, {efficiency.max_fill:.0%} full",
        f"steps     {steps:,} of {rows} rows, about {rows * len(plan.samples) / max(len(plan), 1):.0f} samples",
        f"memory    {bytes_per_device(state) / 2**30:.2f} GiB a device for parameters and optimizer",
        f"{'parameter':44} {'shape':>24} {'type':>9}  {'sharding':30} learning rate",
    ]
    groups, masks = flatten(optimizer.groups), flatten(optimizer.mask)
    for path, leaf in flatten(state.params).items():
        split = ", ".join("x".join(names) if isinstance(names, tuple) else names or "-" for names in leaf.sharding.spec)
        rate = f"{groups[path]} {optimizer.config.learning_rates[groups[path]]:.1e}" if masks[path] else "frozen"
        size = " x ".join(map(str, leaf.shape))
        lines.append(f"{path:44} {size:>24} {leaf.dtype.name:>9}  {split or 'replicated':30} {rate}")
    return "\n".join(lines)


def bytes_per_device(shapes: Any) -> int:
    """Returns the bytes that one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)
    )
