"""The table from logical axes to mesh axes, and the shardings and constraints that follow from it.

The mesh has up to four axes: `data` (rows are split, weights replicated), `fsdp` (rows and weights are split),
`tensor` (heads and hidden units are split) and `context` (positions are split). A mesh may lack any of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> mesh axes, tried in this order. A mesh axis is used once in an array: where two logical axes map to
# it, the first dimension gets it. A mesh axis that does not divide the dimension is left out.
RULES: Mapping[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "vision_row": ("context", "tensor"),  # the tower is split by rows, not by its 16 heads of 72 channels
    "length": ("context",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    # Parameters, split over fsdp along one dimension and over tensor along another.
    "embed": ("fsdp",),
    "mlp": ("tensor", "fsdp"),
    "vocab": ("tensor", "fsdp"),
    "head_dim": ("fsdp",),
    "vision_embed": ("fsdp",),
    "vision_mlp": ("fsdp",),
    "vision_heads": ("fsdp",),
    "patch": (),
    "layers": (),
}


class Grouped(NamedTuple):
    """The logical axis of a dimension that consists of equal groups, within which it is never split.

    Attributes:
      name: Logical axis.
      count: Number of groups.
    """

    name: str
    count: int


Axis = str | Grouped | None  # of one dimension


def partition_spec(axes: Sequence[Axis], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Resolves the logical axes of an array to a partition spec.

    Args:
      axes: Logical axis of each dimension; None for a dimension that is never split.
      shape: Global shape of the array, which decides which mesh axes divide it.
      mesh: Mesh, of which only the axis names and sizes are read.

    Returns:
      The partition spec.
    """
    taken: set[str] = set()
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        name, size = axis if isinstance(axis, Grouped) else (axis, size)
        chosen: list[str] = []
        split = 1
        for mesh_axis in RULES[name] if name else ():
            width = mesh.shape.get(mesh_axis, 1)
            if width > 1 and mesh_axis not in taken and size % (split * width) == 0:
                chosen.append(mesh_axis)
                split *= width
        taken.update(chosen)
        entries.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    return PartitionSpec(*entries)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a partition spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def current_mesh() -> AbstractMesh | None:
    """Returns the mesh of the enclosing `jax.set_mesh`, or None outside of one and inside a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.are_all_axes_manual else mesh


def target_device() -> AbstractDevice | jax.Device:  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stub of it
    """Returns a device with the `platform` and `device_kind` that the enclosing trace is compiled for.

    This is a device of the mesh, also inside a `shard_map` and also where the mesh describes devices that are not
    attached; without a mesh it is the default device.
    """
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    device = jax.sharding.get_abstract_mesh().abstract_device or default or jax.devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of `x` to its logical axes; without a mesh, returns `x` unchanged."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def on_each_device(
    function: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    axes: Sequence[Sequence[str | None]],
    result_axes: Sequence[str | None],
) -> jax.Array:
    """Calls a function of arrays, such as a kernel that no partitioner can split, with the parts of each device.

    Args:
      function: The function, which treats the dimensions that are split independently.
      arrays: Its arguments.
      axes: Logical axes of each of them; a mesh axis that is not among those of the result is gathered.
      result_axes: Logical axes of the result.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(*arrays)
    specs = tuple(partition_spec(names, array.shape, mesh) for names, array in zip(axes, arrays, strict=True))
    result = partition_spec(result_axes, jax.eval_shape(function, *arrays).shape, mesh)
    return jax.shard_map(function, in_specs=specs, out_specs=result, check_vma=False)(*arrays)


def constrain_row_major(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of `x` as `constrain` does, and on TPUs its layout to the order of its dimensions.

    Left to itself the TPU compiler may put the tokens of activations into lanes, and then copies them for every kernel.
    """
    return _constrain_layout(x, row_major, axes)


def constrain_tokens(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of activations [B, L, D]; where L is 1, rows fill the registers of a TPU.

    Left to itself the TPU compiler may give each row registers of its own.
    """
    if x.shape[1] > 1:
        return constrain(x, *axes)
    return _constrain_layout(x, lambda x: with_layout_constraint(x, Layout((1, 0, 2))), axes)


def _constrain_layout(x: jax.Array, lay_out: Callable[[jax.Array], jax.Array], axes: Sequence[str | None]) -> jax.Array:
    if target_device().platform != "tpu":
        return constrain(x, *axes)
    mesh = current_mesh()
    if mesh is None:
        return lay_out(x)
    spec = partition_spec(axes, x.shape, mesh)
    return jax.shard_map(lay_out, in_specs=spec, out_specs=spec, check_vma=False)(x)


def row_major(x: jax.Array) -> jax.Array:
    """Constrains the layout of an array of one device to the order of its dimensions, on TPUs."""
    if target_device().platform != "tpu":
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


# Arrays of a packed batch whose second dimension is that of vision rows.
VISION_ROW_ARRAYS = ("patches", "patch_segment", "patch_hw")


def batch_shardings(batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the sharding of each array of a packed batch: text rows and vision rows are split, nothing else."""

    def sharding(name: str, shape: Sequence[int]) -> NamedSharding:
        axes = ("batch", "vision_row") if name in VISION_ROW_ARRAYS else ("batch",)
        return NamedSharding(mesh, partition_spec((*axes, *[None] * (len(shape) - len(axes))), shape, mesh))

    return {name: sharding(name, array.shape) for name, array in batch.items()}


def shardings(abstract, axes, mesh: Mesh):
    """Returns the shardings of a tree of arrays.

    Args:
      abstract: Tree of arrays or of their shapes.
      axes: Tree of the same structure with the logical axes of each array.
      mesh: Mesh of the shardings.

    Returns:
      A tree of `NamedSharding`.
    """
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, partition_spec(names, leaf.shape, mesh)), abstract, axes
    )
