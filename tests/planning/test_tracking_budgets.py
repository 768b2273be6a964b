"""Tests what a tracked frame costs on a TPU, by the compiler's estimate, and what its kernels do for nothing."""

import itertools
import math
import re

import jax
import pytest

from support.compiler import needs_compiler
from vl3_jax.cli.main import main
from vl3_jax.parallel.topologies import parse_topology
from vl3_jax.planning.hlo import Program
from vl3_jax.planning.plan_tracking import TrackingWorkload, plan_tracking, tracked_model
from vl3_jax.planning.tracking_work import encoder_flops
from vl3_jax.sam2.sam2_model import abstract_sam2

CHIP = parse_topology("v5e:1x1")
OBJECTS, SMALL = 5, 2**16  # elements of an array
PROMPTED = 1, 5  # conditioning frames of each object
# Operations that do not compute.
MOVES = {"parameter", "constant", "convert", "copy", "bitcast", "reshape", "transpose", "slice", "dynamic-slice"}
ENCODER_GMAC = {"tiny": 146, "small": 179, "base-plus": 323, "large": 912}  # counted on the original


@pytest.mark.parametrize("size", ENCODER_GMAC)
def test_products_of_the_image_encoder(size):
    assert encoder_flops(tracked_model(f"2.0-{size}")) / 2e9 == pytest.approx(ENCODER_GMAC[size], rel=0.01)


def made(program: Program):
    """Yields the shape of what each instruction outside of fusions makes, and the operations that make it."""
    insides = {
        instruction.name: {inner.opcode for name in instruction.called for inner in program.computations[name].values()}
        for instructions in program.computations.values()
        for instruction in instructions.values()
        if instruction.opcode == "fusion"
    }
    fused = {
        called
        for instructions in program.computations.values()
        for instruction in instructions.values()
        if instruction.name in insides
        for called in instruction.called
    }
    for name, instructions in program.computations.items():
        for instruction in instructions.values() if name not in fused else ():
            yield instruction.shape, insides.get(instruction.name, {instruction.opcode})


def arrays(shape: str):
    """Yields the element types and sizes of the arrays of a result."""
    for dtype, sizes in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]+)\]", shape):
        yield dtype, tuple(map(int, sizes.split(",")))


def without_ones(sizes) -> tuple[int, ...]:
    return tuple(sorted(size for size in sizes if size > 1))


def shapes_of_copies(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Returns the sorted shapes that a weight of this shape, or a layer or part of it, has as an array or a matrix."""
    found = set()
    for part in (shape, *(shape[:i] + shape[i + 1 :] for i in range(len(shape)) if shape[i] <= 4)):
        matrices = ((math.prod(part[:i]), math.prod(part[i:])) for i in range(1, len(part)))
        found |= {without_ones(sizes) for sizes in itertools.chain([part], matrices)}
    return {sizes for sizes in found if math.prod(sizes) >= SMALL and len(sizes) > 1}


def widened(program: Program, weights: set[tuple[int, ...]]) -> list[str]:
    """Returns the float32 arrays in the shapes of weights that a program makes by conversion alone."""
    return [
        shape
        for shape, operations in made(program)
        if "convert" in operations and operations <= MOVES
        for dtype, sizes in arrays(shape)
        if dtype == "f32" and without_ones(sizes) in weights
    ]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("prompted", PROMPTED)
def test_a_tracked_frame_of_the_large_model(prompted, tmp_path):
    """Five objects, images of 1,024 pixels, on one chip."""
    plan = plan_tracking("2.1-large", CHIP, TrackingWorkload(OBJECTS, prompted), hlo=tmp_path)
    print(plan)
    assert plan.fits
    assert plan.peak < 0.1 * CHIP.chip.hbm_bytes
    assert sum(plan.cycles.values()) <= 2.5 * plan.encoder_cycles
    assert plan.kernels.executed <= 1.15 * plan.kernels.useful
    config = tracked_model("2.1-large")
    weights = set().union(*(shapes_of_copies(leaf.shape) for leaf in jax.tree.leaves(abstract_sam2(config))))
    queries, keys = config.grid**2, (prompted + config.num_memories - 1) * config.grid**2
    for name in ("condition", "track"):
        program = Program((tmp_path / f"{name}.hlo").read_text())
        assert widened(program, weights) == []
        for shape, _ in made(program):
            for _, sizes in arrays(shape):
                *_, second, largest = sorted((1, *sizes))
                assert largest < keys or second < queries, (name, shape)


def test_copies_of_weights_are_known_by_their_shapes():
    expected = {(3, 8, 72, 576), (576, 1728), (72, 13824), (8, 72, 576), (576, 576), (72, 4608)}
    assert shapes_of_copies((576, 3, 8, 72)) >= expected
    assert shapes_of_copies((144, 144)) == set()  # small
    program = Program(
        """
%fused (x: bf16[1728,576]) -> f32[576,1728] {
  %x = bf16[1728,576]{1,0} parameter(0)
  %wide = f32[1728,576]{1,0} convert(%x)
  ROOT %turned = f32[576,1728]{1,0} transpose(%wide), dimensions={1,0}
}

ENTRY %main (w: bf16[1728,576]) -> f32[576,1728] {
  %w = bf16[1728,576]{1,0} parameter(0)
  %sum = f32[576,576]{1,0} add(%a, %b)
  ROOT %copy = f32[576,1728]{1,0} fusion(%w), kind=kLoop, calls=%fused
}
"""
    )
    assert widened(program, shapes_of_copies((576, 3, 8, 72))) == ["f32[576,1728]{1,0}"]


def test_bad_input_is_one_line(capsys):
    for flags, message in (
        (["--track", "3.0-large"], "'3.0-large': no such SAM-2; give 2.1-tiny"),
        (["--track", "2.1-large", "--objects", "0"], "--objects"),
    ):
        assert main(["plan", "--topology", "v5e:1x1", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
