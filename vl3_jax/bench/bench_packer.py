"""Planning of packed rows: how full they are and how fast they are planned, against simpler ways to pack.

Sample lengths are random, in the proportions of stage 4 (paper, table 4), and packed into rows of 40,960 patches and
11,264 tokens, or 16,384 where a sample needs them; the simpler ways have rows of 16,384 tokens.
"""

import numpy as np

from data_pipelines.mixtures import data_settings, mixture
from data_pipelines.packing.lengths import MediaInfo, SampleLengths
from data_pipelines.packing.packing_plan import PackingPlan, epoch_order, packing_efficiency, plan_packing
from data_pipelines.packing.sample_sizes import SampleSizes, compute_sample_sizes
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Table
from vl3_jax.bench.timing import measure_case
from vl3_jax.processing.packed_batch import BatchShape

SHORTER = 11_264  # tokens
IN_ORDER, ONE_A_ROW = "in order", "a row each"
# Thousands of samples by kind; the two kinds of timed video are treated alike.
AMOUNTS = {"video": 3030, "timed video": 241, "image": 880, "text": 1560}
_VIDEO_SIZES = ((256, 340), (336, 596), (360, 640), (480, 854), (720, 1280))  # (height, width)


def measure(settings: Settings) -> Table:
    """Measures planning; `fill` is the mean over rows of the larger of token and patch fill."""
    count = settings.pick(2000, 100_000, 100_000)
    data = data_settings(mixture(image_merge=2, shorter_lengths=(SHORTER,)))
    sample_sizes = compute_sample_sizes(random_lengths(count), data)
    order = epoch_order([sample_sizes.usable], [1.0], 0, 0)
    sides = {
        OURS: lambda: plan_packing(sample_sizes, order, data, (0, 0)),
        IN_ORDER: lambda: in_order(sample_sizes, order, data.shape),
        ONE_A_ROW: lambda: PackingPlan(np.arange(len(order) + 1), order, np.full(len(order), data.shape.length)),
    }

    def figures(side: str, _: float) -> dict[str, float]:
        plan = sides[side]()
        fill = packing_efficiency(plan, sample_sizes, data)
        return {"rows": len(plan), "fill": fill.either, "tokens": fill.tokens, "patches": fill.patches}

    case, rounds = f"{len(order):,} samples of stage 4", min(settings.rounds, 3)
    rows = measure_case(case, sides, rounds, len(order), "samples", figures=figures, warm=False)
    return Table("packer", "planning rows of 11,264 or 16,384 tokens and 40,960 patches, one thread", rows)


def random_lengths(count: int) -> list[SampleLengths]:
    """Generates lengths of text and media with distributions typical of the data of stage 4."""
    shares = np.array(list(AMOUNTS.values())) / sum(AMOUNTS.values())
    rng = np.random.default_rng(0)
    samples = []
    for kind in rng.choice(list(AMOUNTS), count, p=shares):
        if kind == "text":
            samples.append(SampleLengths(int(np.clip(rng.lognormal(6.5, 0.7), 20, 16_000))))
        elif kind == "image":
            height, width = rng.integers(240, 1100, 2)
            samples.append(SampleLengths(int(rng.lognormal(5.5, 0.6)), (MediaInfo(False, int(height), int(width)),)))
        else:
            seconds = rng.lognormal(3.4, 0.9) if kind == "video" else rng.uniform(20, 120)
            frames = int(np.clip(seconds, 2, 180))
            text = int(rng.lognormal(4.8, 0.7)) + 9 * frames
            size = _VIDEO_SIZES[rng.integers(len(_VIDEO_SIZES))]
            samples.append(SampleLengths(text, (MediaInfo(True, *size, frames),)))
    return samples


def in_order(sample_sizes: SampleSizes, order: np.ndarray, shape: BatchShape) -> PackingPlan:
    """Packs samples in order into one open row; a sample that does not fit starts the next row."""
    limits = np.array([shape.length, shape.vision_tokens, shape.patches * shape.vision_rows, shape.samples])
    tokens, patches = sample_sizes.tokens, sample_sizes.patches
    needs = np.stack([tokens, sample_sizes.vision_tokens, patches, np.ones_like(tokens)], axis=1)[order]
    offsets, used = [0], np.zeros_like(limits)
    for index, need in enumerate(needs):
        if np.any(used + need > limits):
            offsets.append(index)
            used = np.zeros_like(limits)
        used = used + need
    return PackingPlan(np.array([*offsets, len(order)]), order, np.full(len(offsets), shape.length))
