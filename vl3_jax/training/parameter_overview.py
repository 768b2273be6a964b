"""What a run prints before its first step: sizes, and where each parameter lives and how it learns."""

import math
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.packing import packing_efficiency
from vl3_jax.training.groups import flatten
from vl3_jax.training.setup import TrainSetup


def parameter_overview(
    config: ConfigDict,
    mesh: Mesh,
    mixture: MixtureDataset,
    program: TrainSetup,
    rows: int,
    total: int,
) -> str:
    """Several lines of text."""
    optimizer, state = program.optimizer, program.target
    shape = mixture.settings.shape
    planned = mixture.epoch_plan(config.seed, 0)
    fill = packing_efficiency(planned, mixture.sample_sizes, shape)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    lines = [
        f"mesh      {axes}: {mesh.devices.size} x {mesh.devices.flat[0].device_kind}, {jax.process_count()} processes",
        f"data      {len(planned.samples):,} samples an epoch in {len(planned):,} rows of {shape.length:,} tokens and "
        f"{shape.patches * shape.vision_rows:,} patches, {fill.max_fill:.0%} full",
        f"steps     {total:,} of {rows} rows, about {rows * len(planned.samples) / max(len(planned), 1):.0f} samples",
        f"memory    {bytes_a_device(state) / 2**30:.2f} GiB a device for parameters and optimizer",
        f"{'parameter':44} {'shape':>24} {'type':>9}  {'on the mesh':30} learning rate",
    ]
    groups, masks = flatten(optimizer.groups), flatten(optimizer.mask)
    for path, leaf in flatten(state.params).items():
        split = ", ".join("x".join(names) if isinstance(names, tuple) else names or "-" for names in leaf.sharding.spec)
        rate = f"{groups[path]} {optimizer.settings.learning_rates[groups[path]]:.1e}" if masks[path] else "frozen"
        size = " x ".join(map(str, leaf.shape))
        lines.append(f"{path:44} {size:>24} {leaf.dtype.name:>9}  {split or 'everywhere':30} {rate}")
    return "\n".join(lines)


def bytes_a_device(shapes: Any) -> int:
    """What one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)
    )
