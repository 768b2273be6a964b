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
ENCODER_GMAC = {"tiny": 146, "small": 179, "base-plus": 323, "large": 912}  # counted on the original


@pytest.mark.parametrize("size", ENCODER_GMAC)
def test_products_of_the_image_encoder(size):
    assert encoder_flops(tracked_model(f"2.0-{size}")) / 2e9 == pytest.approx(ENCODER_GMAC[size], rel=0.01)


def arrays(program: Program):
    """Yields the element types and sizes of the arrays that a program keeps in memory, outside of fusions.

    Those of the loops' state and of constants are left out: the instructions that make them are there too, or nothing does.
    """
    fused = {
        called
        for instructions in program.computations.values()
        for instruction in instructions.values()
        if instruction.opcode == "fusion"
        for called in instruction.called
    }
    carried = ("parameter", "constant", "tuple", "get-tuple-element", "while", "bitcast")
    for name, instructions in program.computations.items():
        for instruction in instructions.values() if name not in fused else ():
            for dtype, sizes in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]+)\]", instruction.shape):
                if instruction.opcode not in carried:
                    yield dtype, tuple(map(int, sizes.split(",")))


def shapes_of_copies(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Returns the sorted shapes that a weight of this shape, or a layer or part of it, has as an array or a matrix."""
    found = set()
    for part in (shape, *(shape[:i] + shape[i + 1 :] for i in range(len(shape)) if shape[i] <= 4)):
        matrices = ((math.prod(part[:i]), math.prod(part[i:])) for i in range(1, len(part)))
        found |= {tuple(sorted(size for size in sizes if size > 1)) for sizes in itertools.chain([part], matrices)}
    return {sizes for sizes in found if math.prod(sizes) >= SMALL and len(sizes) > 1}


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
        for dtype, sizes in arrays(Program((tmp_path / f"{name}.hlo").read_text())):
            assert dtype != "f32" or tuple(sorted(size for size in sizes if size > 1)) not in weights, (name, sizes)
            *_, second, largest = sorted((1, *sizes))
            assert largest < keys or second < queries, (name, sizes)


def test_copies_of_weights_are_known_by_their_shapes():
    assert {(144, 576), (144, 2, 72 * 3)} & shapes_of_copies((144, 3, 2, 72)) == set()
    assert (144, 432) in shapes_of_copies((144, 3, 2, 72))
    assert (2, 72, 144) not in shapes_of_copies((144, 3, 2, 72))  # small
    assert (256, 2048) in shapes_of_copies((4, 2048, 256))


def test_bad_input_is_one_line(capsys):
    for flags, message in (
        (["--track", "3.0-large"], "'3.0-large': no such SAM-2; give 2.1-tiny"),
        (["--track", "2.1-large", "--objects", "0"], "--objects"),
    ):
        assert main(["plan", "--topology", "v5e:1x1", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
