"""The output of `vl3 data stats`, as JSON and as tables."""

import dataclasses
import time
from typing import Any

from data_pipelines import statistics
from data_pipelines.loader import Loader
from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.packing import PackingEfficiency


def collect_stats(mixture: MixtureDataset, budgets: bool = False, measure: int = 0, workers: int = 0) -> dict[str, Any]:
    """Collects the statistics of a mixture as JSON.

    Args:
      mixture: The data.
      budgets: Also pack the samples under other patch budgets.
      measure: Number of rows to read in order to measure throughput; 0 measures nothing.
      workers: Number of worker processes that read these rows; 0 reads them in threads.
    """
    samples, rows, efficiency = statistics.epoch_efficiency(mixture)
    sizes = mixture.sample_sizes
    stats: dict[str, Any] = {
        "datasets": [dataclasses.asdict(summary) for summary in statistics.summarise_datasets(mixture)],
        "epoch": {
            "samples": samples,
            "rows": rows,
            "fill": _fill(efficiency),
            "shrunk": sizes.shrunk,
            "cut": sizes.cut,
            "cut_tokens": sizes.cut_tokens,
        },
        "shape": dataclasses.asdict(mixture.settings.shape),
    }
    if budgets:
        stats["budgets"] = [
            {**dataclasses.asdict(budget), "fill": _fill(budget.fill)} for budget in statistics.suggest_budgets(mixture)
        ]
    if measure:
        stats["speed"] = _measure_speed(mixture, measure, workers)
    return stats


def format_stats(stats: dict[str, Any]) -> str:
    """Formats the result of `collect_stats` as tables for a terminal."""
    lines = [
        f"{'data set':28}{'samples':>11}{'bad':>8}{'tokens':>9}{'median':>8}{'p99':>8}{'vision':>8}{'kept':>7}"
        f"{'shrunk':>9}{'cut':>8}"
    ]
    for dataset in stats["datasets"]:
        kept = "-" if dataset["kept"] is None else f"{dataset['kept']:.0%}"
        mean, median, p99 = dataset["tokens"]
        lines.append(
            f"{dataset['name'][:27]:28}{dataset['samples']:>11,}{dataset['bad']:>8,}{mean:>9.0f}{median:>8.0f}"
            f"{p99:>8.0f}{dataset['vision_tokens'][0]:>8.0f}{kept:>7}{dataset['shrunk']:>9,}{dataset['cut']:>8,}"
        )
    epoch, shape = stats["epoch"], stats["shape"]
    lines += [
        "",
        f"an epoch: {epoch['samples']:,} samples in {epoch['rows']:,} rows of {shape['length']:,} tokens and "
        f"{shape['patches'] * shape['vision_rows']:,} patches",
        f"packing efficiency: {_format_fill(epoch['fill'])}",
    ]
    if epoch["shrunk"] or epoch["cut"]:
        lines.append(
            f"too long: {epoch['shrunk']:,} samples get fewer vision tokens than the settings allow, {epoch['cut']:,} "
            f"are cut at their end ({epoch['cut_tokens']:,} tokens)"
        )
    if "budgets" in stats:
        lines += ["", f"{'patches':>9}{'rows':>11}{'TFLOP/sample':>14}{'shrunk':>9}  efficiency (TFLOP: forward, 2B)"]
        lines += [
            f"{budget['patches']:>9,}{budget['rows']:>11,}{budget['tflop']:>14.1f}{budget['shrunk']:>9,}  "
            f"{_format_fill(budget['fill'])}"
            for budget in stats["budgets"]
        ]
    if "speed" in stats:
        speed = stats["speed"]
        lines += [
            "",
            f"{speed['samples_per_second']:.1f} samples/s, {speed['tokens_per_second']:,.0f} tokens/s, "
            f"{speed['vision_tokens_per_second']:,.0f} vision tokens/s ({speed['steps']} rows, {speed['bad']} bad)",
        ]
    return "\n".join(lines)


def _fill(efficiency: PackingEfficiency) -> dict[str, float]:
    """Returns the JSON form, in which the name of `max_fill` is "either"."""
    return {
        "tokens": efficiency.tokens,
        "patches": efficiency.patches,
        "either": efficiency.max_fill,
        "samples": efficiency.samples,
    }


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
