"""What `vl3 data stats` prints, as JSON and as tables."""

import dataclasses
import time
from typing import Any

from data_pipelines import statistics
from data_pipelines.loader import Loader
from data_pipelines.mixture_dataset import MixtureDataset


def collect(mixture: MixtureDataset, budgets: bool = False, measure: int = 0, workers: int = 0) -> dict[str, Any]:
    """Lengths of each data set, fill of the first epoch; with `budgets` other capacities, with `measure` speed."""
    samples, rows, fill = statistics.epoch_fill(mixture)
    sample_sizes = mixture.sample_sizes
    found: dict[str, Any] = {
        "datasets": [dataclasses.asdict(one) for one in statistics.summaries(mixture)],
        "epoch": {
            "samples": samples,
            "rows": rows,
            "fill": dataclasses.asdict(fill),
            "shrunk": sample_sizes.shrunk,
            "cut": sample_sizes.cut,
            "cut_tokens": sample_sizes.cut_tokens,
        },
        "shape": dataclasses.asdict(mixture.settings.shape),
    }
    if budgets:
        found["budgets"] = [dataclasses.asdict(one) for one in statistics.suggest_budgets(mixture)]
    if measure:
        found["speed"] = _speed(mixture, measure, workers)
    return found


def rendered(found: dict[str, Any]) -> str:
    """Tables for a terminal."""
    lines = [
        f"{'data set':28}{'samples':>11}{'bad':>8}{'tokens':>9}{'median':>8}{'p99':>8}{'vision':>8}{'kept':>7}"
        f"{'shrunk':>9}{'cut':>8}"
    ]
    for one in found["datasets"]:
        kept = "-" if one["kept"] is None else f"{one['kept']:.0%}"
        mean, median, high = one["tokens"]
        lines.append(
            f"{one['name'][:27]:28}{one['samples']:>11,}{one['bad']:>8,}{mean:>9.0f}{median:>8.0f}{high:>8.0f}"
            f"{one['vision_tokens'][0]:>8.0f}{kept:>7}{one['shrunk']:>9,}{one['cut']:>8,}"
        )
    epoch, shape = found["epoch"], found["shape"]
    lines += [
        "",
        f"an epoch: {epoch['samples']:,} samples in {epoch['rows']:,} rows of {shape['length']:,} tokens and "
        f"{shape['patches'] * shape['vision_rows']:,} patches",
        f"fill: {_percent(epoch['fill'])}",
    ]
    if epoch["shrunk"] or epoch["cut"]:
        lines.append(
            f"over-long: {epoch['shrunk']:,} samples get fewer vision tokens than granted, {epoch['cut']:,} are cut at "
            f"their end ({epoch['cut_tokens']:,} tokens)"
        )
    if "budgets" in found:
        lines += ["", f"{'patches':>9}{'rows':>11}{'TFLOP/sample':>14}{'shrunk':>9}  fill (forward pass, 2B)"]
        lines += [
            f"{one['patches']:>9,}{one['rows']:>11,}{one['tflop']:>14.1f}{one['shrunk']:>9,}  {_percent(one['fill'])}"
            for one in found["budgets"]
        ]
    if "speed" in found:
        speed = found["speed"]
        lines += [
            "",
            f"{speed['samples_per_second']:.1f} samples/s, {speed['tokens_per_second']:,.0f} tokens/s, "
            f"{speed['vision_tokens_per_second']:,.0f} vision tokens/s ({speed['steps']} rows, {speed['bad']} bad)",
        ]
    return "\n".join(lines)


def _percent(fill: dict[str, float]) -> str:
    return f"tokens {fill['tokens']:.1%}, patches {fill['patches']:.1%}, larger of both {fill['either']:.1%}"


def _speed(mixture: MixtureDataset, steps: int, workers: int) -> dict[str, Any]:
    """Reads so many rows, the start of threads or workers included."""
    begin = time.perf_counter()
    tokens = vision = 0
    with Loader(mixture, 1, workers=workers, bad_share=1.0) as loader:
        for _, batch in zip(range(steps), loader, strict=False):
            tokens += int((batch.arrays["segment_ids"] > 0).sum())
            vision += int((batch.arrays["vision_slot"] >= 0).sum())
        seconds = time.perf_counter() - begin
        log = loader.log
    return {
        "steps": min(steps, len(loader)),
        "bad": log.bad,
        "samples_per_second": log.seen / seconds,
        "tokens_per_second": tokens / seconds,
        "vision_tokens_per_second": vision / seconds,
    }
