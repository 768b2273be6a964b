"""Builds a device mesh from the sizes of its axes."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from vl3_jax.errors import InputError
from vl3_jax.parallel.rules import MESH_AXES
from vl3_jax.parallel.scatter import stages


def make_mesh(
    sizes: Mapping[str, int],
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stub of it
) -> Mesh:
    """Builds a mesh with the axes data, fsdp, tensor and context, in this order.

    Args:
      sizes: Size of each axis. An omitted axis has size 1; one axis may be -1, which takes the remaining devices.
      devices: Devices of the mesh; None uses all devices of all processes.

    Returns:
      The mesh.

    Raises:
      InputError: An axis is unknown, the product of the sizes is not the number of devices, or `data` is not a multiple
        of the number of TPU slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = set(sizes) - set(MESH_AXES)
    if unknown:
        raise InputError(f"unknown mesh axis {sorted(unknown)[0]!r}; the axes are {', '.join(MESH_AXES)}")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if shape.count(-1) == 1:
        known = -math.prod(shape)
        shape[shape.index(-1)] = len(devices) // known if known else 0
    if math.prod(shape) != len(devices) or min(shape) < 1:
        raise InputError(
            f"mesh {dict(sizes)} does not cover {len(devices)} devices: the sizes must multiply to {len(devices)}"
        )
    grid = _tpu_grid(shape, devices) if devices[0].platform == "tpu" else np.asarray(devices).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _tpu_grid(shape: Sequence[int], devices: Sequence) -> np.ndarray:
    """Arranges the chips so that neighbours on a mesh axis are neighbours in the torus."""
    split = (shape[0], *stages(shape[1]), *shape[2:])
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(split, devices, allow_split_physical_axes=True).reshape(shape)
    data = shape[0]
    if data % slices:
        raise InputError(
            f"{slices} slices are connected by a slow network, which only data parallelism should use: "
            f"mesh.data is {data}, make it a multiple of {slices}"
        )
    within, across = (data // slices, *split[1:]), (slices, *[1] * len(split[1:]))
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return grid.reshape(shape)
