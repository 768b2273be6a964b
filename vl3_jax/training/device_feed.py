"""Puts batches on a mesh: each host builds the rows that its devices hold, and a few batches are prefetched."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.loader import Batch
from vl3_jax.errors import InputError
from vl3_jax.parallel.rules import batch_shardings

PREFETCH = 2  # batches on the devices besides the one in use


def local_rows(mesh: Mesh, rows_per_step: int) -> slice:
    """Returns the rows of a step that this process's devices hold.

    Raises:
      InputError: The rows are not contiguous.
    """
    sharding = batch_shardings({"tokens": jax.ShapeDtypeStruct((rows_per_step, 1), np.int32)}, mesh)["tokens"]
    indices = sharding.addressable_devices_indices_map((rows_per_step, 1)).values()
    rows = sorted({row for index in indices for row in range(*index[0].indices(rows_per_step))})
    if rows != list(range(rows[0], rows[-1] + 1)):
        raise InputError(
            "the rows of this host's devices are not contiguous; order the mesh so that a host's devices are neighbours"
        )
    return slice(rows[0], rows[-1] + 1)


def prefetch_to_device(
    batches: Iterable[Batch], mesh: Mesh, rows_per_step: int, size: int = PREFETCH
) -> Iterator[Batch]:
    """Yields the batches with their arrays on the mesh, sharded by rows; the next ones are transferred in advance.

    Args:
      batches: Batches of a `Loader` with `rows=local_rows(mesh, rows_per_step)`.
      mesh: The mesh, see `parallel.mesh`.
      rows_per_step: Rows of a step on all hosts together.
      size: Number of batches that are transferred before they are requested.
    """
    local = local_rows(mesh, rows_per_step)
    queue: collections.deque[Batch] = collections.deque()
    for batch in batches:
        queue.append(dataclasses.replace(batch, arrays=_to_mesh(batch.arrays, mesh, rows_per_step, local)))
        if len(queue) > size:
            yield queue.popleft()
    yield from queue


def sum_across_hosts(counts: np.ndarray) -> np.ndarray:
    """Sums the array [bad, seen] over all processes; for `Loader(reduce_counts=...)`."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(counts)).reshape(-1, len(counts)).sum(axis=0)


def _to_mesh(arrays: Mapping[str, np.ndarray], mesh: Mesh, rows_per_step: int, local: slice) -> dict[str, jax.Array]:
    shapes = {
        name: jax.ShapeDtypeStruct((rows_per_step, *array.shape[1:]), array.dtype) for name, array in arrays.items()
    }
    shardings = batch_shardings(shapes, mesh)

    def shard(name: str, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(rows_per_step)
        return arrays[name][start - local.start : stop - local.start][(slice(None), *index[1:])]

    return {
        name: jax.make_array_from_callback(shape.shape, shardings[name], lambda index, name=name: shard(name, index))
        for name, shape in shapes.items()
    }
