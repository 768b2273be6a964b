"""TPU slices by name: what to ask the compiler for, and what their chips can do.

Sources: cloud.google.com/tpu/docs, pages "TPU v4", "v5e", "v5p", "v6e": shapes of slices, memory, rates and prices of
chips.
"""

import dataclasses
import math
import re

from vl3_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPU.

    Attributes:
      name: as the compiler calls it.
      hbm: bytes that a program may use.
      flops: dense bfloat16 FLOP/s.
      bandwidth: of the HBM, bytes/s.
      links: bytes/s to all neighbours together, one way.
      dimensions: of a slice: 2 (a torus of rows and columns) or 3.
      cores_in_names: its cloud names count cores, two a chip.
    """

    name: str
    hbm: int
    flops: float
    bandwidth: float
    links: float
    dimensions: int
    cores_in_names: bool = False


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(31.25 * GIB), 275e12, 1.2e12, 300e9, 3, cores_in_names=True),
        Chip("v5e", int(15.75 * GIB), 197e12, 0.82e12, 200e9, 2),
        Chip("v5p", int(95.74 * GIB), 459e12, 2.765e12, 600e9, 3, cores_in_names=True),
        Chip("v6e", int(31.25 * GIB), 918e12, 1.64e12, 400e9, 2),
    )
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}
_SHAPES_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_SHAPES_3D = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice, or several that are joined by the data centre's network.

    Attributes:
      chip: of which it is made.
      shape: of a slice, in chips.
      slices: how many.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """How many there are, of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """As the compiler takes it, "v5e:8x8"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def doubled(self) -> "Topology | None":
        """A slice of twice as many chips, its shortest side doubled, the last of these; None if this is the largest."""
        if math.prod(self.shape) >= max(_SHAPES_2D if self.chip.dimensions == 2 else _SHAPES_3D):
            return None
        side = max(range(len(self.shape)), key=lambda place: (-self.shape[place], place))
        shape = tuple(size * (1 + (place == side)) for place, size in enumerate(self.shape))
        return dataclasses.replace(self, shape=shape)


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Slices by the compiler's name ("v5e:8x8", "v5p:4x4x4") or the cloud's ("v5litepod-64", "v5p-128", "v6e-64").

    The number of "v4-N" and "v5p-N" counts cores, two a chip; that of the others counts chips.

    Raises:
      InputError: an unknown generation, shape or size; names the known ones.
    """
    if slices < 1:
        raise InputError(f"{slices} slices; give 1 or more")
    found = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)+)|-(\d+))", name.strip().lower())
    generation = _ALIASES.get(found[1], found[1]) if found else ""
    if generation not in CHIPS:
        raise InputError(f"topology {name!r}: give one like v5e:8x8, v5litepod-64, v5p-128 or v6e-64")
    chip = CHIPS[generation]
    if found[2]:
        shape = tuple(map(int, found[2].split("x")))
        if len(shape) != chip.dimensions or min(shape) < 1:
            raise InputError(f"topology {name!r}: a slice of {generation} has {chip.dimensions} dimensions")
        return Topology(chip, shape, slices)
    count = int(found[3]) // (2 if chip.cores_in_names else 1)
    shapes = _SHAPES_2D if chip.dimensions == 2 else _SHAPES_3D
    if count not in shapes or (chip.cores_in_names and int(found[3]) % 2):
        sizes = ", ".join(str(size * (2 if chip.cores_in_names else 1)) for size in shapes)
        raise InputError(f"topology {name!r}: {found[1]} comes in {sizes}; others by their shape, {generation}:AxB")
    return Topology(chip, shapes[count], slices)
