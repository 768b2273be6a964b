"""Rows of a step: how many there are, and how mesh and accumulation cut them."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vl3_jax.errors import InputError

ROW_AXES = ("data", "fsdp")  # of the mesh, which split the rows of a step


def row_parts(config: ConfigDict, mesh: Mesh) -> int:
    """What divides the rows of a step: the parts of the mesh, times those that go one after another."""
    parts = config.batch.grad_accum_steps or 1
    for axis in ROW_AXES:
        parts *= mesh.shape[axis]
    return parts


def check_rows(config: ConfigDict, mesh: Mesh, rows: int) -> None:
    """InputError where mesh and accumulation do not divide `rows`."""
    parts = row_parts(config, mesh)
    if rows % parts:
        split = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in ROW_AXES)
        raise InputError(
            f"{rows} rows of a step do not divide into {parts} parts (mesh {split}, accumulation "
            f"{config.batch.grad_accum_steps or 1}); change batch.rows, mesh or batch.grad_accum_steps"
        )


def rows_for_samples(config: ConfigDict, mesh: Mesh, samples_a_row: float) -> int:
    """The rows that hold about `config.batch.samples` samples, as a multiple of what divides them."""
    parts = row_parts(config, mesh)
    return max(round(config.batch.samples / samples_a_row / parts), 1) * parts


def grad_accum_steps(config: ConfigDict, mesh: Mesh, rows: int) -> int:
    """Parts of a step that go one after another: those given, or so many that a part of the mesh has one row each."""
    return config.batch.grad_accum_steps or rows // row_parts(config, mesh)
