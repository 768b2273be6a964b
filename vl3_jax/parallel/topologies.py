"""TPU topologies by name, and the memory and speed of their chips.

Source: cloud.google.com/tpu/docs, pages "TPU v4", "v5e", "v5p" and "v6e", for shapes of slices, memory and rates.
"""

import dataclasses
import math
import re

from vl3_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Attributes:
      name: Name that the compiler uses, such as "v5e".
      hbm_bytes: Bytes of HBM that a program may use.
      peak_flops: Peak dense bfloat16 FLOP/s.
      clock: Cycles per second, from the peak and the matrix units: 4 of 128 x 128, in v6e of 256 x 256, and in
        v4 and v5p 4 in each of two cores.
      hbm_bandwidth: Bandwidth of the HBM in bytes/s.
      link_bandwidth: Bandwidth of the links to all neighbours together, one way, in bytes/s.
      dimensions: Dimensions of a slice's torus, 2 or 3.
      named_by_cores: Whether names such as "v5p-128" count cores, of which a chip has two, instead of chips.
    """

    name: str
    hbm_bytes: int
    peak_flops: float
    clock: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    named_by_cores: bool = False


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(31.25 * GIB), 275e12, 1.05e9, 1.2e12, 300e9, 3, named_by_cores=True),
        Chip("v5e", int(15.75 * GIB), 197e12, 1.5e9, 0.82e12, 200e9, 2),
        Chip("v5p", int(95.74 * GIB), 459e12, 1.75e9, 2.765e12, 600e9, 3, named_by_cores=True),
        Chip("v6e", int(31.25 * GIB), 918e12, 1.75e9, 1.64e12, 400e9, 2),
    )
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}
# Shapes of the slices that have a name, by the number of dimensions.
_SHAPES = {
    2: [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)],
    3: [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)],
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One TPU slice, or several slices connected by the data-centre network.

    Attributes:
      chip: Generation of the chips.
      shape: Shape of a slice in chips.
      slices: Number of slices.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """Name of a slice that the compiler understands, such as "v5e:8x8"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def doubled(self) -> "Topology | None":
        """Returns a topology whose slices have twice as many chips, or None if these slices are the largest.

        The shortest side is doubled, the last one of several.
        """
        if math.prod(self.shape) >= math.prod(_SHAPES[self.chip.dimensions][-1]):
            return None
        shortest = max(range(len(self.shape)), key=lambda axis: (-self.shape[axis], axis))
        shape = tuple(size * (1 + (axis == shortest)) for axis, size in enumerate(self.shape))
        return dataclasses.replace(self, shape=shape)


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Parses the name of a TPU topology.

    Args:
      name: Name for the compiler ("v5e:8x8", "v5p:4x4x4") or the accelerator type of Google Cloud ("v5litepod-64",
        "v5p-128", "v6e-64"). The number of "v4-N" and "v5p-N" counts cores, two per chip; that of the others chips.
      slices: Number of slices.

    Returns:
      The topology.

    Raises:
      InputError: The generation, the shape or the size is unknown.
    """
    if slices < 1:
        raise InputError(f"{slices} slices: give 1 or more")
    match = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)+)|-(\d+))", name.strip().lower())
    generation = _ALIASES.get(match[1], match[1]) if match else ""
    if match is None or generation not in CHIPS:
        raise InputError(f"topology {name!r}: give one like v5e:8x8, v5litepod-64, v5p-128 or v6e-64")
    chip = CHIPS[generation]
    if match[2]:
        shape = tuple(map(int, match[2].split("x")))
        if len(shape) != chip.dimensions or min(shape) < 1:
            raise InputError(f"topology {name!r}: a slice of {generation} has {chip.dimensions} dimensions")
        return Topology(chip, shape, slices)
    cores = 2 if chip.named_by_cores else 1
    shapes = {math.prod(shape) * cores: shape for shape in _SHAPES[chip.dimensions]}
    if int(match[3]) not in shapes:
        sizes = ", ".join(map(str, shapes))
        raise InputError(
            f"topology {name!r}: {match[1]} comes in {sizes}; give other sizes by their shape, {generation}:AxB"
        )
    return Topology(chip, shapes[int(match[3])], slices)
