"""Accumulates metrics between two log steps: losses, and what the batches held, over steps and hosts."""

import collections
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.loader import Batch
from data_pipelines.sample_errors import SampleErrorLog
from vl3_jax.training import device_feed
from vl3_jax.training.flops import StepFlops, peak_flops

# What a host counts of its own rows, in the order in which the counts are summed over hosts.
_COUNTS = ("samples", "tokens", "vision tokens", "patches", "kept patches", "rows", "fill", "flops")


class MetricAccumulator:
    """Accumulates the metrics of the steps since the last log step.

    Args:
      flops: Counts the FLOPs of a batch.
      tasks: Names of the tasks whose loss is reported apart.
      mesh: Mesh whose devices do the work.
    """

    def __init__(self, flops: StepFlops, tasks: Sequence[str], mesh: Mesh):
        self._flops, self._tasks = flops, tasks
        self._devices = mesh.devices.size
        self._peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._batch_counts: dict[int, np.ndarray] = {}
        self.reset()

    def reset(self) -> None:
        """Starts anew: no steps, no time."""
        self._started, self._waited = time.perf_counter(), 0.0
        self._sums: collections.Counter[str] = collections.Counter()
        self._counts = np.zeros(len(_COUNTS))
        self._latest: dict[str, float] = {}
        self._steps = 0

    def observe(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches themselves and counts each while it is still in this host's memory."""
        for batch in batches:
            self._batch_counts[batch.step] = self._count(batch)
            yield batch

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Returns the next batch; the time until it is there counts as waiting."""
        started = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - started
        return batch

    def add(self, batch: Batch, metrics: Mapping[str, Any]) -> None:
        """Adds a step that is done; `metrics` are those that the step returned, on the host."""
        self._steps += 1
        self._counts += self._batch_counts.pop(batch.step)
        self._sums["loss"] += float(metrics["loss"]) * float(metrics["weight"])
        self._sums["weight"] += float(metrics["weight"])
        for number, task in enumerate(self._tasks):
            self._sums[f"loss/{task}"] += float(metrics["task_loss"][number])
            self._sums[f"weight/{task}"] += float(metrics["task_weight"][number])
        self._sums["grad norm"] += float(metrics["grad_norm"])
        rates = {f"learning rate/{group}": float(rate) for group, rate in metrics["learning_rates"].items()}
        self._latest = {**rates, "epoch": batch.epoch}

    def summary(self, log: SampleErrorLog) -> dict[str, float]:
        """Returns means and speeds since the last reset, over all hosts, and resets. Every host must call this."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        counts = self._counts
        if jax.process_count() > 1:
            counts = device_feed.sum_across_hosts(counts)
        count = dict(zip(_COUNTS, counts.tolist(), strict=True))
        flops_per_second = count["flops"] / seconds / self._devices
        summary = {
            "loss": self._sums["loss"] / max(self._sums["weight"], 1e-9),
            **{
                f"loss/{task}": self._sums[f"loss/{task}"] / self._sums[f"weight/{task}"]
                for task in self._tasks
                if task and self._sums[f"weight/{task}"]
            },
            "grad norm": self._sums["grad norm"] / max(self._steps, 1),
            "tokens/s": count["tokens"] / seconds,
            "vision tokens/s": count["vision tokens"] / seconds,
            "samples/s": count["samples"] / seconds,
            "seconds/step": seconds / max(self._steps, 1),
            "tflops/device": flops_per_second / 1e12,
            **({"mfu": flops_per_second / self._peak} if self._peak else {}),
            "packing efficiency": count["fill"] / max(count["rows"], 1),
            "kept": count["kept patches"] / max(count["patches"], 1),
            "data wait": self._waited / seconds,
            "bad samples": log.bad,
            **self._latest,
        }
        self.reset()
        return summary

    def _count(self, batch: Batch) -> np.ndarray:
        arrays = batch.arrays
        tokens = (arrays["segment_ids"] > 0).sum(axis=1)
        patches = (arrays["patch_segment"] > 0).sum(axis=(1, 2))
        length = arrays["segment_ids"].shape[1]
        capacity = arrays["patch_segment"][0].size
        fill = np.maximum(tokens / length, patches / capacity)
        counts = {
            "samples": (batch.samples >= 0).sum(),
            "tokens": tokens.sum(),
            "vision tokens": (arrays["vision_slot"] >= 0).sum(),
            "patches": patches.sum(),
            "kept patches": (arrays["token_patches"] >= 0).sum(),
            "rows": (tokens > 0).sum(),
            "fill": fill.sum(),
            "flops": self._flops(arrays),
        }
        return np.array([float(counts[name]) for name in _COUNTS])
