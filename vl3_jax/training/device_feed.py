"""Batches onto a mesh: each host assembles the rows that its own devices hold, and a few batches wait there."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.loader import Batch
from vl3_jax.errors import InputError
from vl3_jax.parallel.rules import batch_shardings

AHEAD = 2  # batches on the devices besides the one at work


def local_rows(mesh: Mesh, rows_per_step: int) -> slice:
    """The rows of a step that this process's devices hold. InputError where they are not one stretch."""
    sharding = batch_shardings({"tokens": jax.ShapeDtypeStruct((rows_per_step, 1), np.int32)}, mesh)["tokens"]
    spans = sharding.addressable_devices_indices_map((rows_per_step, 1)).values()
    rows = sorted({row for span in spans for row in range(*span[0].indices(rows_per_step))})
    if rows != list(range(rows[0], rows[-1] + 1)):
        raise InputError("this host's devices hold scattered rows; order the mesh so that hosts are neighbours")
    return slice(rows[0], rows[-1] + 1)


def prefetch_to_device(batches: Iterable[Batch], mesh: Mesh, rows_per_step: int, ahead: int = AHEAD) -> Iterator[Batch]:
    """The same batches with their arrays on the mesh, sharded by rows, those to come already on their way.

    Args:
      batches: of a `Loader` with `rows=local_rows(mesh, rows_per_step)`.
      mesh: see `parallel.mesh`.
      rows_per_step: on all hosts together.
      ahead: batches put on the devices before they are asked for.
    """
    held = local_rows(mesh, rows_per_step)
    waiting: collections.deque[Batch] = collections.deque()
    for batch in batches:
        waiting.append(dataclasses.replace(batch, arrays=_placed(batch.arrays, mesh, rows_per_step, held)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def sum_across_hosts(counts: np.ndarray) -> np.ndarray:
    """Sums [bad, seen] over all processes; for `Loader(agree=...)`."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(counts)).reshape(-1, len(counts)).sum(axis=0)


def _placed(arrays, mesh: Mesh, rows_per_step: int, held: slice) -> dict[str, jax.Array]:
    shapes = {
        name: jax.ShapeDtypeStruct((rows_per_step, *array.shape[1:]), array.dtype) for name, array in arrays.items()
    }
    shardings = batch_shardings(shapes, mesh)

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        first, last, _ = index[0].indices(rows_per_step)
        return arrays[name][first - held.start : last - held.start][(slice(None), *index[1:])]

    return {
        name: jax.make_array_from_callback(shape.shape, shardings[name], lambda index, name=name: part(name, index))
        for name, shape in shapes.items()
    }
