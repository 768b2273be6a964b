"""Planning rows: how full they are and how fast they are planned, beside simpler ways to pack.

Lengths are drawn in the proportions of stage 4 (paper, table 4) and packed into rows of 16,384 tokens and 40,960
patches.
"""

import numpy as np

from data_pipelines.lengths import MediaInfo, SampleLengths
from data_pipelines.mixtures import data_settings, mixture
from data_pipelines.packing import PackingPlan, epoch_order, packing_efficiency, plan_packing
from data_pipelines.sample_sizes import SampleSizes, compute_sample_sizes
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.bench.timing import in_turns
from vl3_jax.processing.packed_batch import BatchShape

IN_ORDER, ALONE = "in order", "a row each"
# Thousands of samples by kind; the two kinds of timed video are drawn alike.
AMOUNTS = {"video": 3030, "timed video": 241, "image": 880, "text": 1560}
_SIZES = ((256, 340), (336, 596), (360, 640), (480, 854), (720, 1280))  # of videos


def measure(settings: Settings) -> Table:
    """Fill is the mean over rows of the larger of token and patch fill."""
    count = settings.pick(2000, 100_000, 100_000)
    data = data_settings(mixture(image_merge=2))
    sample_sizes = compute_sample_sizes(lengths(count), data)
    order = epoch_order([sample_sizes.usable], [1.0], 0, 0)
    planned = {}
    sides = {
        OURS: lambda: planned.update({OURS: plan_packing(sample_sizes, order, data.shape, (0, 0))}),
        IN_ORDER: lambda: planned.update({IN_ORDER: in_order(sample_sizes, order, data.shape)}),
        ALONE: lambda: planned.update({ALONE: PackingPlan(np.arange(len(order) + 1), order)}),
    }
    seconds = in_turns(sides, min(settings.rounds, 3), warm=False)
    rows = []
    for side, time in seconds.items():
        fill = packing_efficiency(planned[side], sample_sizes, data.shape)
        figures = {"rows": len(planned[side]), "fill": fill.max_fill, "tokens": fill.tokens, "patches": fill.patches}
        rows.append(Row(f"{len(order):,} samples of stage 4", side, time, len(order), "samples", None, figures))
    return Table("packer", "planning rows of 16,384 tokens and 40,960 patches, one thread", rows)


def lengths(count: int) -> list[SampleLengths]:
    """Samples with text and media as long as those of such data tend to be."""
    share = np.array(list(AMOUNTS.values())) / sum(AMOUNTS.values())
    rng = np.random.default_rng(0)
    found = []
    for kind in rng.choice(list(AMOUNTS), count, p=share):
        if kind == "text":
            found.append(SampleLengths(int(np.clip(rng.lognormal(6.5, 0.7), 20, 16_000))))
        elif kind == "image":
            height, width = rng.integers(240, 1100, 2)
            found.append(SampleLengths(int(rng.lognormal(5.5, 0.6)), (MediaInfo(False, int(height), int(width)),)))
        else:
            seconds = rng.lognormal(3.4, 0.9) if kind == "video" else rng.uniform(20, 120)
            frames = int(np.clip(seconds, 2, 180))
            text = int(rng.lognormal(4.8, 0.7)) + 9 * frames
            found.append(SampleLengths(text, (MediaInfo(True, *_SIZES[rng.integers(len(_SIZES))], frames),)))
    return found


def in_order(sample_sizes: SampleSizes, order: np.ndarray, shape: BatchShape) -> PackingPlan:
    """One open row: a sample that does not fit opens the next."""
    limits = np.array([shape.length, shape.vision_tokens, shape.patches * shape.vision_rows, shape.samples])
    needs = np.stack(
        [sample_sizes.tokens, sample_sizes.vision_tokens, sample_sizes.patches, np.ones_like(sample_sizes.tokens)],
        axis=1,
    )[order]
    offsets, used = [0], np.zeros_like(limits)
    for number, need in enumerate(needs):
        if np.any(used + need > limits):
            offsets.append(number)
            used = np.zeros_like(limits)
        used = used + need
    return PackingPlan(np.array([*offsets, len(order)]), order)
