"""Building a mesh from a `{axis: size}` request."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from vl3_jax.errors import InputError
from vl3_jax.parallel.rules import MESH_AXES


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor, context, in this order.

    Args:
      sizes: size of each axis; an axis left out has size 1, one axis may be -1 (what is left).
      devices: all of the process group's devices unless given.

    Raises:
      InputError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = set(sizes) - set(MESH_AXES)
    if unknown:
        raise InputError(f"unknown mesh axis {sorted(unknown)[0]!r}; the axes are {', '.join(MESH_AXES)}")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if shape.count(-1) == 1:
        rest = -int(np.prod(shape))
        shape[shape.index(-1)] = len(devices) // rest if rest else 0
    if int(np.prod(shape)) != len(devices) or min(shape) < 1:
        raise InputError(
            f"mesh {dict(sizes)} does not cover {len(devices)} devices: the sizes must multiply to {len(devices)}"
        )
    if devices[0].platform == "tpu":
        return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
