"""The metrics of a run: accumulated between two log steps, written, and measured on held-out data."""

import contextlib
import datetime
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines.loader import Batch
from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.sample_errors import SampleErrorLog
from vl3_jax.errors import RunError
from vl3_jax.model.config import ModelConfig
from vl3_jax.storage.disk_space import translate_write_errors
from vl3_jax.storage.durable import atomic_write
from vl3_jax.storage.paths import is_url
from vl3_jax.training.data import build_loader, open_held_out, prefetch_to_device, sum_across_hosts
from vl3_jax.training.flops import StepFlops, peak_flops
from vl3_jax.training.run_config import RunConfig
from vl3_jax.training.setup import TrainSetup
from vl3_jax.training.step import make_eval_step

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
# Metrics in the progress bar.
_IN_BAR = ("loss", "tokens/s", "samples/s", "mfu", "packing efficiency", "kept", "data wait")


class NotFiniteError(RunError):
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
        self._mixture, self._devices = mixture, mesh.devices.size
        self._peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._batch_counts: dict[int, dict[str, float]] = {}
        self.reset()

    def reset(self) -> None:
        """Starts anew: no steps, no time."""
        self._started, self._waited = time.perf_counter(), 0.0
        # Of each step: what this host counts of its own rows, and what the step returned.
        self._counts: list[dict[str, float]] = []
        self._steps: list[dict[str, Any]] = []

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
        self._counts.append(self._batch_counts.pop(batch.step))
        self._steps.append({**metrics, "epoch": batch.epoch})

    def summary(self, log: SampleErrorLog) -> dict[str, float]:
        """Returns means and speeds since the last reset, over all hosts, and resets.

        Every host must call this, after at least one step.
        """
        seconds = max(time.perf_counter() - self._started, 1e-9)
        counts = np.sum([list(counts.values()) for counts in self._counts], axis=0)
        count = dict(zip(self._counts[0], sum_across_hosts(counts).tolist(), strict=True))
        loss, weight, norm, task_loss, task_weight = (
            np.array([step[name] for step in self._steps], np.float64)
            for name in ("loss", "weight", "grad_norm", "task_loss", "task_weight")
        )
        per_task = zip(self._mixture.tasks, task_loss.sum(axis=0), task_weight.sum(axis=0), strict=True)
        flops_per_second = count["flops"] / seconds / self._devices
        summary = {
            "loss": float((loss * weight).sum() / max(weight.sum(), 1e-9)),
            **{f"loss/{task}": float(total / weight) for task, total, weight in per_task if task and weight},
            "grad norm": float(norm.mean()),
            "tokens/s": count["tokens"] / seconds,
            "vision tokens/s": count["vision tokens"] / seconds,
            "samples/s": count["samples"] / seconds,
            "seconds/step": seconds / len(self._steps),
            "tflops/device": flops_per_second / 1e12,
            **({"mfu": flops_per_second / self._peak} if self._peak else {}),
            "packing efficiency": count["fill"] / max(count["rows"], 1),
            "kept": count["kept patches"] / max(count["patches"], 1),
            "data wait": self._waited / seconds,
            "bad samples": log.bad,
            **{f"learning rate/{group}": float(rate) for group, rate in self._steps[-1]["learning_rates"].items()},
            "epoch": self._steps[-1]["epoch"],
        }
        self.reset()
        return summary

    def _count(self, batch: Batch) -> dict[str, float]:
        arrays = batch.arrays
        is_token, is_patch = arrays["segment_ids"] > 0, arrays["patch_segment"] > 0
        tokens, patches = is_token.sum(axis=1), is_patch.sum(axis=(1, 2))
        return {
            "samples": (batch.samples >= 0).sum(),
            "tokens": tokens.sum(),
            "vision tokens": (arrays["vision_slot"] >= 0).sum(),
            "patches": patches.sum(),
            "kept patches": (arrays["token_patches"] >= 0).sum(),
            "rows": (tokens > 0).sum(),
            "fill": np.maximum(is_token.mean(axis=1), is_patch.mean(axis=(1, 2))).sum(),
            "flops": self._flops(arrays),
        }


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
        self._active, self._curves = active, None
        self._path = epath.Path(workdir) / METRICS
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=" steps",
            file=sys.stderr,
            disable=not active,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )
        if not active:
            return
        # A file on an object store cannot be appended to, so its lines are kept and written again.
        with translate_write_errors(self._path):
            self._lines = _lines_up_to(self._path, done) if self._path.exists() else []
            atomic_write(self._path, "".join(self._lines).encode())
        if tensorboard:
            from vl3_jax.training.curves import Curves

            with translate_write_errors(folder := epath.Path(workdir) / TENSORBOARD):
                self._curves = Curves(folder, done)

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
        with translate_write_errors(self._path):
            if is_url(self._path):
                self._path.write_text("".join(self._lines))
            else:
                with self._path.open("a") as file:
                    file.write(self._lines[-1])
            if self._curves is not None:
                self._curves.write(step, values)

    def close(self) -> None:
        """Closes the progress bar and the event file."""
        self._bar.close()
        if self._curves is not None:
            with translate_write_errors(self._path.with_name(TENSORBOARD)):
                self._curves.close()


def _lines_up_to(path: epath.Path, step: int) -> list[str]:
    """Returns the lines of metrics.jsonl up to a step."""
    kept = []
    for line in path.read_bytes().decode(errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a killed job or a power cut may leave half a line
            if json.loads(line)["step"] <= step:
                kept.append(line)
    return kept


def _short(value: float) -> str:
    return f"{value / 1000:.3g}k" if abs(value) >= 1000 else f"{value:.3g}"


def _json_number(value):
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Evaluator:
    """Measures the loss on the annotations that `config.eval` names, and asks benchmarks; without either never due.

    Args:
      config: Configuration of the run.
      setup: Computation of the run.
      mixture: Training data.
      rows: Rows of a step on all hosts together.
      ask: Maps parameters to scores of benchmarks by name; None for no benchmarks.
    """

    def __init__(
        self,
        config: RunConfig,
        setup: TrainSetup,
        mixture: MixtureDataset,
        rows: int,
        ask: Callable[[Any], dict[str, float]] | None = None,
    ):
        self._config, self._mesh, self._rows = config, setup.mesh, rows
        self._held_out = open_held_out(config, mixture)
        self._step = make_eval_step(setup.model)
        self._ask = ask

    def is_due(self, step: int, total: int) -> bool:
        """Returns whether to evaluate after `step` of `total` steps: every so many, and after the last."""
        every = self._config.eval.every
        wanted = self._held_out is not None or self._ask is not None
        return wanted and (step == total or (every > 0 and step % every == 0))

    def measure(self, params: Any) -> dict[str, float]:
        """Returns the mean loss of a supervised token, in nats, and the scores of the benchmarks."""
        loss = {} if self._held_out is None else {"held-out loss": self._loss(params, self._held_out)}
        return loss | ({} if self._ask is None else self._ask(params))

    def _loss(self, params: Any, held_out: MixtureDataset) -> float:
        with build_loader(self._config, held_out, self._mesh, self._rows) as loader:
            batches = prefetch_to_device(loader, self._mesh, self._rows)
            first = itertools.islice(batches, self._config.eval.steps or None)
            sums = [jax.device_get(self._step(params, batch.arrays)) for batch in first]
        weight = sum(float(batch.weight) for batch in sums)
        return sum(float(batch.loss) for batch in sums) / max(weight, 1e-9)
