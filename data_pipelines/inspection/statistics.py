"""Statistics of a mixture: lengths of its samples, packing efficiency, cost of other patch budgets, reading speed."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.index import Index
from data_pipelines.loader import Loader
from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.packing.lengths import UNKNOWN, compute_sample_size
from data_pipelines.packing.packing_plan import epoch_order, packing_efficiency, plan_packing
from data_pipelines.packing.sample_sizes import SampleSizes, compute_sample_sizes, concatenate
from data_pipelines.settings import DataSettings
from vl3_jax.text_table import text_table

# TFLOP of a forward pass: the decoder (2B) per token at 16,384 tokens, the vision tower per patch at 40,960 patches.
_DECODER_TFLOP = 43 / 16_384
_TOWER_TFLOP = 34 / 40_960
_PATCHES = (8_192, 16_384, 24_576, 32_768, 40_960, 49_152, 65_536)
_MAX_SAMPLES = 200_000  # samples that are packed to judge a patch budget


def collect_stats(mixture: MixtureDataset, budgets: bool = False, measure: int = 0, workers: int = 0) -> dict[str, Any]:
    """Collects the statistics of a mixture as JSON.

    Args:
      mixture: The data.
      budgets: Also pack the samples under other patch budgets.
      measure: Number of rows to read in order to measure throughput; 0 measures nothing.
      workers: Number of worker processes that read these rows; 0 reads them in threads.

    Returns:
      "datasets": the `summarise_datasets`. "epoch": samples, rows and packing efficiency ("fill") of the first epoch.
      "shape": the capacities of the longest rows, and "lengths", the tokens of all. "budgets": the `suggest_budgets`.
      "speed": what was read per second.
    """
    plan, sizes, shape = mixture.epoch_plan(0, 0), mixture.sample_sizes, mixture.settings.shape
    stats: dict[str, Any] = {
        "datasets": summarise_datasets(mixture),
        "epoch": {
            "samples": len(plan.samples),
            "rows": len(plan),
            "fill": dataclasses.asdict(packing_efficiency(plan, sizes, mixture.settings)),
            **{name: getattr(sizes, name) for name in ("shrunk", "cut", "cut_tokens")},
        },
        "shape": dataclasses.asdict(shape),
        "lengths": mixture.settings.lengths,
    }
    if budgets:
        stats["budgets"] = suggest_budgets(mixture)
    if measure:
        stats["speed"] = _measure_speed(mixture, measure, workers)
    return stats


def format_stats(stats: dict[str, Any]) -> str:
    """Formats the result of `collect_stats` as tables for a terminal."""
    rows = [("data set", "samples", "bad", "tokens", "median", "p99", "vision", "kept", "shrunk", "cut")]
    for dataset in stats["datasets"]:
        samples, bad, shrunk, cut = (f"{dataset[name]:,}" for name in ("samples", "bad", "shrunk", "cut"))
        lengths = [f"{value:.0f}" for value in (*dataset["tokens"], dataset["vision_tokens"][0])]
        kept = "-" if dataset["kept"] is None else f"{dataset['kept']:.0%}"
        rows.append((dataset["name"], samples, bad, *lengths, kept, shrunk, cut))
    epoch, shape = stats["epoch"], stats["shape"]
    lines = [
        *text_table(rows, "<>>>>>>>>>"),
        "",
        f"an epoch: {epoch['samples']:,} samples in {epoch['rows']:,} rows of {row_lengths(stats['lengths'])} tokens "
        f"and {shape['patches'] * shape['vision_rows']:,} patches",
        f"packing efficiency: {_format_fill(epoch['fill'])}",
    ]
    if epoch["shrunk"] or epoch["cut"]:
        lines.append(
            f"too long: {epoch['shrunk']:,} samples get fewer vision tokens than the settings allow, {epoch['cut']:,} "
            f"are cut at their end ({epoch['cut_tokens']:,} tokens)"
        )
    if "budgets" in stats:
        rows = [("patches", "rows", "TFLOP/sample", "shrunk", "efficiency (TFLOP: forward, 2B)")]
        for budget in stats["budgets"]:
            patches, count, shrunk = (f"{budget[name]:,}" for name in ("patches", "rows", "shrunk"))
            rows.append((patches, count, f"{budget['tflop']:.1f}", shrunk, _format_fill(budget["fill"])))
        lines += ["", *text_table(rows, ">>>><")]
    if "speed" in stats:
        speed = stats["speed"]
        lines += [
            "",
            f"{speed['samples_per_second']:.1f} samples/s, {speed['tokens_per_second']:,.0f} tokens/s, "
            f"{speed['vision_tokens_per_second']:,.0f} vision tokens/s ({speed['steps']} rows, {speed['bad']} bad)",
        ]
    return "\n".join(lines)


def row_lengths(lengths: Sequence[int]) -> str:
    """Formats the lengths of rows, such as "11,264 or 16,384"."""
    return " or ".join(f"{length:,}" for length in lengths)


def summarise_datasets(mixture: MixtureDataset) -> list[dict[str, Any]]:
    """Summarises the samples of each data set.

    Returns:
      For each data set its "name"; the number of "samples", of which some are "bad" (too long ones included); mean,
      median and 99th percentile of "tokens", "vision_tokens" and "patches" of a usable sample; the share of vision
      tokens "kept" by pruning in samples with videos (None if the index does not count them); and the number of samples
      with fewer vision tokens than the settings allow ("shrunk") and of those "cut" at their end.
    """
    return [
        {
            "name": dataset.spec.name,
            "samples": len(sizes),
            "bad": int((~sizes.usable).sum()),
            **{name: _spread(getattr(sizes, name)[sizes.usable]) for name in ("tokens", "vision_tokens", "patches")},
            "kept": _kept_share(dataset.index, mixture.settings, sizes),
            "shrunk": sizes.shrunk,
            "cut": sizes.cut,
        }
        for dataset, sizes in zip(mixture.datasets, mixture.sample_sizes_by_dataset, strict=True)
    ]


def suggest_budgets(mixture: MixtureDataset, patches: Sequence[int] = _PATCHES) -> list[dict[str, Any]]:
    """Packs the same samples, at most 200,000 of them, under other patch budgets.

    Args:
      mixture: The data.
      patches: The budgets, in patches of all vision rows of a text row together.

    Returns:
      For each budget its "patches", the number of "rows", their packing efficiency ("fill"), the number of samples with
      fewer vision tokens than the settings allow ("shrunk"), and the "tflop" of a forward pass per sample; sorted by
      the last.
    """
    budgets, shape, merge = [], mixture.settings.shape, mixture.settings.processor.image_merge
    for budget in patches:
        capacities = {"patches": budget // shape.vision_rows, "vision_tokens": min(shape.length, budget // merge**2)}
        settings = dataclasses.replace(mixture.settings, shape=dataclasses.replace(shape, **capacities))
        sizes = concatenate(
            [compute_sample_sizes(dataset.index, settings, dataset.spec.name) for dataset in mixture.datasets]
        )
        order = epoch_order([sizes.usable], [1.0], 0, 0)[:_MAX_SAMPLES]
        plan = plan_packing(sizes, order, settings, (0, 0))
        tflop = int(plan.lengths.sum()) * _DECODER_TFLOP + len(plan) * budget * _TOWER_TFLOP
        budgets.append(
            {
                "patches": budget,
                "rows": len(plan),
                "fill": dataclasses.asdict(packing_efficiency(plan, sizes, settings)),
                "shrunk": sizes.shrunk,
                "tflop": tflop / max(len(order), 1),
            }
        )
    return sorted(budgets, key=lambda budget: budget["tflop"])


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    """Returns mean, median and 99th percentile."""
    if not len(values):
        return 0.0, 0.0, 0.0
    return float(values.mean()), float(np.median(values)), float(np.percentile(values, 99))


def _kept_share(index: Index, settings: DataSettings, sizes: SampleSizes) -> float | None:
    """Returns the share of vision tokens kept by pruning, over the usable samples whose videos the index counted."""
    after = before = 0
    for number, lengths in enumerate(index):
        if sizes.usable[number] and any(medium.kept != UNKNOWN for medium in lengths.media):
            media = tuple(dataclasses.replace(medium, kept=UNKNOWN) for medium in lengths.media)
            after += int(sizes.vision_tokens[number])
            before += compute_sample_size(dataclasses.replace(lengths, media=media), settings).vision_tokens
    return after / before if before else None


def _format_fill(fill: dict[str, float]) -> str:
    return f"tokens {fill['tokens']:.1%}, patches {fill['patches']:.1%}, larger of both {fill['either']:.1%}"


def _measure_speed(mixture: MixtureDataset, steps: int, workers: int) -> dict[str, Any]:
    """Reads `steps` rows; the time includes the start of threads or workers."""
    start = time.perf_counter()
    tokens = vision_tokens = 0
    with Loader(mixture, 1, workers=workers, bad_share=1.0) as loader:
        for _, batch in zip(range(steps), loader, strict=False):
            tokens += int((batch.arrays["segment_ids"] > 0).sum())
            vision_tokens += int((batch.arrays["vision_slot"] >= 0).sum())
        seconds = time.perf_counter() - start
        log = loader.log
    return {
        "steps": min(steps, len(loader)),
        "bad": log.bad,
        "samples_per_second": log.seen / seconds,
        "tokens_per_second": tokens / seconds,
        "vision_tokens_per_second": vision_tokens / seconds,
    }
