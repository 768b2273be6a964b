"""Rows as full as those of stage 4, and what kernels do for them."""

import numpy as np
import pytest

from support.compiler import needs_compiler
from vl3_jax.model import preset
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.topologies import parse_topology
from vl3_jax.planning.compiler import topology_devices
from vl3_jax.planning.kernel_work import kernel_flops
from vl3_jax.planning.typical_row import typical_row
from vl3_jax.training import run_config

REMAT = {"vision": "full", "text": "full"}


def row_of(*changes):
    return typical_row(run_config.load("stage4:2b", changes).data)


def test_short_rows_are_full_of_tokens_and_long_ones_of_patches():
    short, long = row_of(), row_of("data.shorter_lengths=()")
    assert (short.shape.length, long.shape.length) == (11_264, 16_384)
    assert short.tokens / short.shape.length == pytest.approx(0.99, abs=1e-3)
    assert long.patches / long.shape.patches == pytest.approx(0.97, abs=1e-3)
    assert short.samples / short.patches == pytest.approx(long.samples / long.patches, rel=1e-3)
    for row in (short, long):
        frames, samples = row.segments
        assert np.count_nonzero(frames) == row.patches
        assert np.count_nonzero(samples) == row.tokens
        assert np.bincount(frames)[1:-1].tolist() == [400] * (frames.max() - 1)
        assert samples.max() == 3


@needs_compiler
def test_kernels_multiply_the_blocks_that_hold_a_pair():
    """Eight frames of 256 in blocks of 256 are eight pairs of blocks; two causal samples of 512 one pair each."""
    mesh = make_mesh({}, topology_devices(parse_topology("v5e:1x1"))[:1])
    frames, samples = np.repeat(np.arange(1, 9, dtype=np.int32), 256), np.repeat(np.array([1, 2], np.int32), 512)
    config = preset("2b")
    trainable = {"vision": True, "text": True}
    work = kernel_flops(config, mesh, frames, samples, trainable, REMAT)
    # Forward, forward again and backward: 2, 2 and 7 products over 128 lanes, whatever the width of a head.
    assert work["tower attention"] == 27 * 16 * 11 * 2 * 8 * 256**2 * 128
    assert work["decoder attention"] == 28 * 12 * 11 * 2 * 2 * 512**2 * 128
    once = kernel_flops(config, mesh, frames, samples, {"vision": False, "text": True}, REMAT | {"text": "none"})
    assert once["tower attention"] == work["tower attention"] * 2 / 11
    assert once["decoder attention"] == work["decoder attention"] * 9 / 11
    # A frame that begins inside a block meets the next block, too: 3 blocks of 400 patches have more than 3 pairs.
    shifted = kernel_flops(config, mesh, np.repeat(np.arange(1, 6, dtype=np.int32), 400), samples, trainable, REMAT)
    assert shifted["tower attention"] > 27 * 16 * 11 * 2 * 5 * 400**2 * 128
