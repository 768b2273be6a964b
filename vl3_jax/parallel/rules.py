"""The one table from logical axes to mesh axes, and the two things made from it: shardings and constraints.

The mesh has up to four axes: `data` (whole copies of the weights), `fsdp` (weights split, rows split),
`tensor` (heads and hidden units split) and `context` (positions split). A mesh may lack any of them.
"""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> mesh axes, tried in the order given. An axis of the mesh is used once in an array: where two
# logical axes ask for it, the first dimension has it. A mesh axis that does not divide the dimension is left out.
RULES: Mapping[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "vision_row": ("context", "tensor"),  # the tower's 16 heads of 72 do not split; its rows do
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


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Resolves the logical `axes` of an array of `shape` on `mesh`.

    Args:
      axes: a logical name, or None for a dimension that is never split, for each dimension.
      shape: the global shape; decides which mesh axes divide.
      mesh: only its axis names and sizes are read.
    """
    taken: set[str] = set()
    entries = []
    for name, size in zip(axes, shape, strict=True):
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


def current_mesh() -> AbstractMesh | None:
    """The mesh of the enclosing `jax.set_mesh`, or None outside one (or inside a `shard_map`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.are_all_axes_manual else mesh


def target_device() -> AbstractDevice | jax.Device:
    """What the enclosing trace is compiled for; its `platform` and `device_kind`.

    A device of the mesh, also inside a `shard_map` and also where the mesh is of devices that are not there; without
    a mesh the default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device or jax.devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to keep `x` sharded by its logical axes; without a mesh, `x` as it is."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


# Arrays of the packed batch that have vision rows after the text rows.
VISION_ROW_ARRAYS = ("patches", "patch_segment", "patch_hw")


def batch_shardings(batch: Mapping[str, jax.Array], mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each array of a packed batch lives on `mesh`: rows split, vision rows too, nothing else."""

    def place(name: str, shape: Sequence[int]) -> NamedSharding:
        axes = ("batch", "vision_row") if name in VISION_ROW_ARRAYS else ("batch",)
        return NamedSharding(mesh, partition_spec((*axes, *[None] * (len(shape) - len(axes))), shape, mesh))

    return {name: place(name, array.shape) for name, array in batch.items()}


def shardings(abstract, axes, mesh: Mesh):
    """A tree of `NamedSharding` for a tree of arrays (or shapes) and the like tree of logical axes."""
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, partition_spec(names, leaf.shape, mesh)), abstract, axes
    )
