"""Tests that the sides of a benchmark do the same work, and that tables report the measurements."""

import functools
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl3_jax.bench import bench_loss, bench_packer, bench_packing, bench_pruning, bench_step, inputs
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, REFERENCE, Row, Table
from vl3_jax.bench.timing import compiled, measure_case, process_memory, results_in_turns, run_python
from vl3_jax.kernels import blockwise
from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.backend import attend as run_backend
from vl3_jax.kernels.segment_info import active_blocks
from vl3_jax.processing.diff_pruning import keep_mask
from vl3_jax.processing.packed_batch import BatchShape


def attend(info, q, k, v):
    return run_backend(blockwise.BLOCKWISE, AttentionInputs(q, k, v, info, info, causal=False, scale=1.0))


def test_attention_without_skipping_is_slower_and_equal():
    frames = inputs.segment_info([256] * 16)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4096, 2, 16))
    packed = compiled(functools.partial(attend), frames, q, k, v)
    with bench_packing.without_skipping():
        assert np.all(blockwise.active_blocks(frames, frames, 256, 256, False))
        unskipped = compiled(functools.partial(attend), frames, q, k, v)
    assert np.asarray(blockwise.active_blocks(frames, frames, 256, 256, False)).sum() == 16
    np.testing.assert_allclose(packed(), unskipped(), atol=1e-6)
    # 16 times the work; the bound is much lower because the machine may be busy.
    rows = measure_case("attention", {OURS: packed, "nothing skipped": unskipped}, 5, 1, "runs")
    seconds = {row.side: row.seconds for row in rows}
    assert seconds["nothing skipped"] > 3 * seconds[OURS]


@pytest.mark.parametrize(("count", "length", "causal", "min_ratio"), [(64, 256, False, 64), (16, 1024, True, 13)])
def test_a_full_row_skips_most_blocks(count, length, causal, min_ratio):
    """Compares the active pairs of blocks of packed samples with those of one sample in rows of 16,384 tokens."""
    packed, one_sample = inputs.segment_info([length] * count), inputs.segment_info([length * count])
    packed_blocks, all_blocks = (int(active_blocks(x, x, 256, 256, causal).sum()) for x in (packed, one_sample))
    assert all_blocks / packed_blocks >= min_ratio


def test_losses_agree():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, unembedding = jax.random.normal(keys[0], (1, 24, 16)), jax.random.normal(keys[1], (40, 16))
    targets = jax.random.randint(keys[2], (1, 24), 0, 40)
    sides = [side(hidden, unembedding, targets) for side in (bench_loss.chunked, bench_loss.plain)]
    np.testing.assert_allclose(*sides, rtol=1e-5)


def test_masks_agree():
    pixels = np.random.default_rng(0).normal(size=(5, 6, 24)).astype(np.float32)
    pixels[2] = pixels[1]
    pixels[3, :4] = pixels[2, :4]
    np.testing.assert_array_equal(bench_pruning.looped_keep_mask(pixels), keep_mask(pixels))


def test_rows_packed_in_order_stay_within_their_capacity():
    sample_sizes = bench_packer.compute_sample_sizes(
        bench_packer.random_lengths(300), bench_packer.data_settings(bench_packer.mixture(image_merge=2))
    )
    shape = BatchShape(16_384, 40_960, 10_240)
    order = np.flatnonzero(sample_sizes.usable)
    plan = bench_packer.in_order(sample_sizes, order, shape)
    np.testing.assert_array_equal(plan.samples, order)
    for row in range(len(plan)):
        assert len(plan[row]) > 0
        assert sample_sizes.tokens[plan[row]].sum() <= shape.length
        assert sample_sizes.patches[plan[row]].sum() <= shape.patches


def test_a_step_has_the_loss_of_the_reference():
    pytest.importorskip("torch", reason="the reference is not installed: pip install -e '.[parity]'")
    pair = inputs.model_pair(Settings(small=True))
    mean = functools.partial(bench_step.mean_loss, pair.model)
    rng = np.random.default_rng(0)
    samples = [inputs.random_sample(rng, 12, 4) for _ in range(3)]
    packed, separate = (bench_step.packed_rows(rows) for rows in ([samples], [[sample] for sample in samples]))
    ours, ours_separate = (jax.jit(mean)(pair.params, batch) for batch in (packed, separate))
    np.testing.assert_allclose(ours, ours_separate, rtol=1e-5)
    theirs = pair.reference.loss(samples).item()
    assert float(ours) == pytest.approx(theirs, rel=1e-4)


def test_segments_and_positions_restart_in_every_row():
    segment_ids, positions = inputs.segment_info([2, 2, 4], rows=2)
    np.testing.assert_array_equal(segment_ids, [[1, 1, 2, 2], [1, 1, 1, 1]])
    np.testing.assert_array_equal(positions, [[0, 1, 0, 1], [0, 1, 2, 3]])


def test_sides_are_measured_in_turns():
    order = []
    runs = {name: functools.partial(order.append, name) for name in "ab"}
    assert set(results_in_turns(runs, 2)) == {"a", "b"}
    assert order == ["a", "b"] * 3
    order.clear()
    results_in_turns(runs, 1, warm=False)
    assert order == ["a", "b"]


def test_a_compiled_side_reports_its_memory():
    run = compiled(lambda x: (x @ x) @ x, jnp.ones((64, 64)))
    assert float(run()[0, 0]) == 64**2
    assert run.temporaries >= 0


def test_memory_of_a_child_process_is_measured():
    idle, busy = (run_python("-c", f"import time; x = b'x' * {size}; time.sleep(0.5)") for size in (1, 100_000_000))
    assert 90e6 < busy.peak_bytes - idle.peak_bytes < 110e6
    assert idle.cpu_seconds < idle.seconds
    assert process_memory("VmRSS") > 10e6
    with pytest.raises(subprocess.CalledProcessError):
        run_python("-c", "raise SystemExit(3)")


def test_a_table_compares_equal_amounts():
    rows = [
        Row("long", OURS, 2.0, 100, "tokens", flops=4e9, figures={"temporaries MB": 1.5}),
        Row("long", REFERENCE, 0.1, 1, "tokens"),
        Row("short", OURS, 1.0, 10, "tokens"),
    ]
    table = Table("name", "description", rows, ("a note",))
    assert table.ratio(rows[1]) == pytest.approx(5)
    text = table.rendered(peak=4e9)
    assert text.splitlines()[1] == "name: description"
    assert "50%" in text
    assert "temporaries MB 1.5" in text
    assert text.count("long") == 1
    assert text.splitlines()[-1] == "  a note"
    json_rows = table.as_json(peak=4e9)["rows"]
    assert (json_rows[0]["share_of_peak"], json_rows[1]["share_of_peak"]) == (0.5, None)
    assert (json_rows[0]["rate"], json_rows[0]["unit"]) == (50, "tokens/s")
