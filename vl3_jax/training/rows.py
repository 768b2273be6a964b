"""The number of rows in a step, and how mesh and gradient accumulation divide them."""

from jax.sharding import Mesh

from vl3_jax.errors import InputError
from vl3_jax.training.run_config import BatchConfig

ROW_AXES = ("data", "fsdp")  # mesh axes that split the rows of a step


def row_parts(config: BatchConfig, mesh: Mesh) -> int:
    """Returns what must divide the rows of a step: the parts of the mesh times the microbatches."""
    parts = config.grad_accum_steps or 1
    for axis in ROW_AXES:
        parts *= mesh.shape[axis]
    return parts


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
