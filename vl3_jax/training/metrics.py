"""The metrics of a run: accumulated between two log steps, written, and measured on held-out data."""

import collections
import datetime
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines.loader import Batch
from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.sample_errors import SampleErrorLog
from vl3_jax.model.config import ModelConfig
from vl3_jax.storage.paths import is_url
from vl3_jax.training.data import build_loader, open_held_out, prefetch_to_device, sum_across_hosts
from vl3_jax.training.flops import StepFlops, peak_flops
from vl3_jax.training.run_config import RunConfig
from vl3_jax.training.setup import TrainSetup
from vl3_jax.training.step import make_eval_step

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
# What a host counts of its own rows, in the order in which the counts are summed over hosts.
_COUNTS = ("samples", "tokens", "vision tokens", "patches", "kept patches", "rows", "fill", "flops")
# Metrics in the progress bar.
_IN_BAR = ("loss", "tokens/s", "samples/s", "mfu", "packing efficiency", "kept", "data wait")

logger = logging.getLogger(__name__)


class NotFiniteError(RuntimeError):
    """Loss or gradient became infinite or undefined. Nothing after that step is kept."""


class MetricAccumulator:
    """Accumulates the metrics of the steps since the last log step.

    Args:
      config: Configuration of the run, for the count of FLOPs.
      model_config: Sizes of the model, likewise.
      mixture: Training data, whose tasks have a loss of their own.
      mesh: Mesh whose devices do the work.
    """

    def __init__(self, config: RunConfig, model_config: ModelConfig, mixture: MixtureDataset, mesh: Mesh):
        self._flops = StepFlops(model_config, config.optimizer.learning_rates, config.lora.rank)
        self._mixture, self._tasks = mixture, mixture.tasks
        self._devices = mesh.devices.size
        self._peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._batch_counts: dict[int, np.ndarray] = {}
        self.reset()

    def reset(self) -> None:
        """Starts anew: no steps, no time."""
        self._started, self._waited = time.perf_counter(), 0.0
        self._sums: collections.defaultdict[str, float] = collections.defaultdict(float)
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
        """Adds a step that is done.

        Args:
          batch: Batch of the step.
          metrics: What the step returned; fetched to the host here.

        Raises:
          NotFiniteError: Loss or gradient is infinite or undefined; names the samples of the step.
        """
        metrics = jax.device_get(metrics)
        if not metrics["finite"]:
            numbers = batch.samples[batch.samples >= 0].tolist()
            located = map(self._mixture.locate, numbers[:8])
            names = ", ".join(f"{dataset.spec.name} #{local + 1}" for dataset, local in located)
            raise NotFiniteError(
                f"step {batch.step + 1}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; its samples are "
                f"{names}{' ...' if len(numbers) > 8 else ''}. Lower the learning rate or inspect them, and resume "
                "from the last checkpoint"
            )
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
            counts = sum_across_hosts(counts)
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


class MetricWriter:
    """Writes metrics; on hosts other than the first, nowhere.

    Args:
      workdir: Workdir of the run, local or gs://.
      total: Number of optimizer steps in the whole run.
      done: Steps done before this start; metrics of later ones are dropped, for these steps are done again.
      active: Whether this is the first host.
      tensorboard: Whether event files are written, too.
    """

    def __init__(self, workdir: str | epath.Path, total: int, done: int, active: bool, tensorboard: bool = True):
        self._active = active
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=" steps",
            file=sys.stderr,
            disable=not active,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )
        self._writer = self._buffer = None
        if not active:
            return
        workdir = epath.Path(workdir)
        self._path = workdir / METRICS
        # A file on an object store cannot be appended to, so its lines are kept and written again.
        self._lines = _lines_up_to(self._path, done) if self._path.exists() else []
        self._rewrite()
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = workdir / TENSORBOARD
            if is_url(workdir):
                # tensorboardX writes to gs:// in a thread, after an error in which the run would wait forever.
                self._buffer = tempfile.TemporaryDirectory(prefix="vl3-events-")
            self._writer = SummaryWriter(self._buffer.name if self._buffer else str(self._events), purge_step=done)

    def step(self, number: int) -> None:
        """Moves the progress bar to step `number` (from 1)."""
        self._bar.update(number - self._bar.n)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes metrics by name after `step` steps."""
        if not self._active:
            return
        self._bar.set_postfix_str(" ".join(f"{name} {_short(values[name])}" for name in _IN_BAR if name in values))
        record = {"step": step, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **values}
        record = {name: _json_number(value) for name, value in record.items()}
        self._lines.append(json.dumps(record) + "\n")
        self._append()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name.replace(" ", "_"), value, step)
            self._writer.flush()
            self._copy_events()

    def log(self, text: str) -> None:
        """Logs a text on the first host."""
        if self._active:
            logger.info("%s", text)

    def close(self) -> None:
        """Closes the progress bar and the event file."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
            self._copy_events()

    def _copy_events(self) -> None:
        """Copies the event files, as they are now, to the object store."""
        if self._buffer is not None:
            for file in os.scandir(self._buffer.name):
                (self._events / file.name).write_bytes(epath.Path(file.path).read_bytes())

    def _append(self) -> None:
        if is_url(self._path):
            self._rewrite()
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(self._lines[-1])

    def _rewrite(self) -> None:
        self._path.write_text("".join(self._lines))


def _lines_up_to(path: epath.Path, step: int) -> list[str]:
    """Returns the lines of metrics.jsonl up to a step."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # the last line of a job that was killed may be cut off
            continue
    return kept


def _short(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}"


def _json_number(value):
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Evaluator:
    """Measures the loss on the annotations that `config.eval` names; without any it is never due."""

    def __init__(self, config: RunConfig, setup: TrainSetup, mixture: MixtureDataset, rows: int):
        self._config, self._mesh, self._rows = config, setup.mesh, rows
        self._held_out = open_held_out(config.eval, mixture)
        self._step = make_eval_step(setup.model)

    def is_due(self, step: int) -> bool:
        """Returns whether to evaluate after `step` steps."""
        return self._held_out is not None and step % self._config.eval.every == 0

    def measure(self, params: Any) -> dict[str, float]:
        """Returns the mean loss of a supervised token, in nats."""
        assert self._held_out is not None
        loss = weight = 0.0
        with build_loader(self._config, self._held_out, self._mesh, self._rows) as loader:
            steps = min(self._config.eval.steps or len(loader), len(loader))
            for number, batch in enumerate(prefetch_to_device(loader, self._mesh, self._rows), start=1):
                sums = jax.device_get(self._step(params, batch.arrays))
                loss, weight = loss + float(sums.loss), weight + float(sums.weight)
                if number == steps:
                    break
        return {"held-out loss": loss / max(weight, 1e-9)}
