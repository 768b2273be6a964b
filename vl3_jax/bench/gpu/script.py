"""The script: runs the parts one after another, within the minutes that there are, and saves what they measure."""

import json
import multiprocessing
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from vl3_jax.bench.gpu import PARTS, Part
from vl3_jax.bench.gpu.cases import Conditions
from vl3_jax.bench.gpu.process import ERROR, MACHINE, MEASUREMENT, run_part
from vl3_jax.errors import InputError

RESULTS = "gpu.json"
_CACHE = "compiled"  # folder of compiled programs
_SPAWN = multiprocessing.get_context("spawn")
_EXIT_SECONDS = 10


def run(folder: pathlib.Path, minutes: float, small: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Runs all parts; DIR/gpu.json is written after every measurement.

    Args:
      folder: Folder DIR of the results.
      minutes: Minutes after which no part begins and none goes on.
      small: Whether to run in miniature, on any device.
      report: Called with a line of text for each measurement, and for each part that fails or is skipped.

    Returns:
      The content of the file. Each of its `parts` has a list of `measurements`; `error` if it did not end well;
      `skipped`, with the reason, if it did not begin.

    Raises:
      InputError: There is no GPU, and `small` is False.
    """
    start = time.monotonic()
    results: dict[str, Any] = {"machine": None, "small": small, "minutes": minutes, "seconds": 0.0, "parts": {}}
    for name, part in PARTS.items():
        found: dict[str, Any] = {"title": part.title, "measurements": []}
        results["parts"][name] = found
        begin = time.monotonic()
        left = start + 60 * minutes - begin
        if left <= 0:
            found["skipped"] = f"the {minutes:g} minutes were over"
            report(f"{name:10} skipped: {found['skipped']}")
        else:
            limit = min(left, 60 * minutes * part.share)
            describe = results["machine"] is None
            for kind, content in _messages(part, limit, _conditions(results), folder / _CACHE, describe):
                if kind == MACHINE:
                    results["machine"] = content
                    if content["platform"] == "cpu" and not small:
                        raise InputError("gpu: jax found no GPU; --small runs the script in miniature on any device")
                elif kind == MEASUREMENT:
                    found["measurements"].append(content)
                    report(_line(name, content))
                else:
                    found["error"] = content
                    report(f"{name:10} failed: {content}")
                found["seconds"] = time.monotonic() - begin
                _save(folder, results)
        results["seconds"] = time.monotonic() - start
        _save(folder, results)
    return results


def _messages(part: Part, limit: float, *arguments: Any) -> Iterator[tuple[str, Any]]:
    """Runs a part in a process of its own and yields what it sends; an error, last, if the process does not end well.

    Args:
      part: The part.
      limit: Seconds after which its process is killed.
      *arguments: Other arguments of `run_part`.
    """
    deadline = time.monotonic() + limit
    receiver, sender = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=run_part, args=(part, *arguments, sender), daemon=True)
    process.start()
    sender.close()  # the process then has the only one, and `recv` notices its end
    try:
        while receiver.poll(max(deadline - time.monotonic(), 0)):
            try:
                message = receiver.recv()
            except (EOFError, OSError):
                process.join(_EXIT_SECONDS)
                if process.exitcode:
                    yield ERROR, _how_it_ended(process.exitcode)
                return
            yield message
        yield ERROR, f"stopped after {limit:.0f} s"
    finally:
        process.kill()
        process.join()
        receiver.close()


def _how_it_ended(exitcode: int) -> str:
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit code {exitcode}"


def _conditions(results: dict[str, Any]) -> Conditions:
    """Returns the conditions of the next part, with the peak rates measured so far."""
    measured = results["parts"].get("peaks", {"measurements": []})["measurements"]
    rates = {name: value for row in measured for name, value in row.items() if name.endswith("_per_second")}
    return Conditions(results["small"], **rates)


def _line(part: str, measurement: dict[str, Any]) -> str:
    cells = (f"{name.replace('_', ' ')} {_short(value)}" for name, value in measurement.items())
    return f"{part:10} {'  '.join(cells)}"


def _short(value: Any) -> str:
    """Formats a number with at least three significant digits, such as "12,345" or "0.0456"."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _save(folder: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes the results; a reader, or whoever stops the script, finds a whole file at any time."""
    unfinished = folder / f".{RESULTS}"
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(unfinished, folder / RESULTS)
