"""What a person sees of a run: a progress bar, a line of JSON for each report, TensorBoard curves."""

import datetime
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping

from etils import epath
from tqdm import tqdm

from vl3_jax.checkpoint.paths import is_url

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_SHOWN = ("loss", "tokens/s", "samples/s", "mfu", "fill", "kept", "data wait")  # in the bar


class MetricWriter:
    """Writes reports where they belong; on hosts other than the first, nowhere.

    Args:
      workdir: of the run, local or gs://.
      total: steps of the whole run.
      done: steps of earlier sessions.
      active: this is the first host.
      tensorboard: write event files, too.
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
        # A file on an object store cannot grow; it is written anew.
        self._lines = _before(self._path, done) if self._path.exists() else []
        self._rewrite()
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = workdir / TENSORBOARD
            if is_url(workdir):
                # What tensorboardX has for gs:// writes in a thread; after an error there the run would wait forever.
                self._buffer = tempfile.TemporaryDirectory(prefix="vl3-events-")
            self._writer = SummaryWriter(self._buffer.name if self._buffer else str(self._events), purge_step=done)

    def step(self, number: int) -> None:
        """Step `number` (from 1) is done."""
        self._bar.update(number - self._bar.n)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Values after `step` steps: those of the whole, and `loss/<task>` and the like."""
        if not self._active:
            return
        self._bar.set_postfix_str(" ".join(f"{name} {_short(values[name])}" for name in _SHOWN if name in values))
        record = {"step": step, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **values}
        record = {name: _json_number(value) for name, value in record.items()}
        self._lines.append(json.dumps(record) + "\n")
        self._append()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name.replace(" ", "_"), value, step)
            self._writer.flush()
            self._copy_events()

    def say(self, text: str) -> None:
        """A line for the person at the terminal, above the bar."""
        if self._active:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
            self._copy_events()

    def _copy_events(self) -> None:
        """Event files to the object store, whole, as they are now."""
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


def _before(path: epath.Path, step: int) -> list[str]:
    """Reports up to a step: later ones belong to steps that are done again."""
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
