"""Shows and writes the metrics of a run: a progress bar, lines of metrics.jsonl, TensorBoard events."""

import datetime
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Mapping

from etils import epath
from tqdm import tqdm

from vl3_jax.checkpoint.paths import is_url

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
# Metrics in the progress bar.
_IN_BAR = ("loss", "tokens/s", "samples/s", "mfu", "packing efficiency", "kept", "data wait")


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
