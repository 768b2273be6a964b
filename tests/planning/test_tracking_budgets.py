"""Tests what a tracked frame costs on a TPU, by the compiler's estimate, and what its kernels do for nothing."""

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
MILLION_CYCLES = {1: 80, 5: 90}  # a frame, by the conditioning frames of each object
ENCODER_GMAC = {"tiny": 146, "small": 179, "base-plus": 323, "large": 912}  # counted on the original


@pytest.mark.parametrize("size", ENCODER_GMAC)
def test_products_of_the_image_encoder(size):
    assert encoder_flops(tracked_model(f"2.0-{size}")) / 2e9 == pytest.approx(ENCODER_GMAC[size], rel=0.01)


def arrays(program: Program):
    """Yields the element types and sizes of the arrays that a program keeps in memory, outside of fusions."""
    fused = {
        called
        for instructions in program.computations.values()
        for instruction in instructions.values()
        if instruction.opcode == "fusion"
        for called in instruction.called
    }
    for name, instructions in program.computations.items():
        for instruction in instructions.values() if name not in fused else ():
            for dtype, sizes in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]+)\]", instruction.shape):
                yield dtype, tuple(map(int, sizes.split(",")))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("prompted", MILLION_CYCLES)
def test_a_tracked_frame_of_the_large_model(prompted, tmp_path):
    """Five objects, images of 1,024 pixels, on one chip."""
    plan = plan_tracking("2.1-large", CHIP, TrackingWorkload(OBJECTS, prompted), hlo=tmp_path)
    print(plan)
    assert plan.fits
    assert plan.peak < 0.6 * CHIP.chip.hbm_bytes
    assert sum(plan.cycles.values()) <= MILLION_CYCLES[prompted] * 1e6
    assert plan.kernels.executed <= 1.15 * plan.kernels.useful
    config = tracked_model("2.1-large")
    weights = {math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_sam2(config))}
    queries, keys = config.grid**2, (prompted + config.num_memories - 1) * config.grid**2
    for name in ("condition", "track"):
        for dtype, sizes in arrays(Program((tmp_path / f"{name}.hlo").read_text())):
            count = math.prod(sizes)
            assert dtype != "f32" or count < SMALL or count not in weights, (name, sizes)
            *_, second, largest = sorted((1, *sizes))
            assert largest < keys or second < queries, (name, sizes)


def test_bad_input_is_one_line(capsys):
    for flags, message in (
        (["--track", "3.0-large"], "'3.0-large': no such SAM-2; give 2.1-tiny"),
        (["--track", "2.1-large", "--objects", "0"], "--objects"),
    ):
        assert main(["plan", "--topology", "v5e:1x1", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
