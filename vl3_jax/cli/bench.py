"""`vl3 bench`: measures the speed of this machine and compares with plain implementations and with transformers."""

import argparse
import functools
import importlib.util
import json
import logging
import os
import pathlib
import textwrap
from collections.abc import Mapping

from vl3_jax.bench import GPU, ROUNDS, SUBJECTS
from vl3_jax.bench.gpu import PARTS
from vl3_jax.cli.settings_flags import number
from vl3_jax.config_tree import Limits
from vl3_jax.errors import InputError

logger = logging.getLogger(__name__)

EPILOG = """examples:
  vl3 bench                                  all subjects: half an hour on a small CPU
  vl3 bench tower prefill --model 2b
  vl3 bench gpu --out RUNS/bench             a GPU in 8 minutes: training step, attention, decoding
  vl3 bench processor loader --media tests/data/media/images/* tests/data/media/videos/*
  vl3 bench conversion --model 2b            converts 3.9 GB; takes four times that much space below TMPDIR
  vl3 bench --small                          tiny sizes: checks that every subject runs; the figures mean nothing
  vl3 bench gpu --small                      the same of the script, on any device

subjects:
{}

All sides of a case are measured in turns, in one run; times are medians. Weights are random. In a checkout of the
project with torch and transformers, their video_llama_3 with the same weights is one of the sides. --long adds the time
and memory of an hour of video to `processor`, and the memory over 2,000 samples to `loader`. "x ours" is the time that
a side takes for the same amount, in multiples of ours; "of peak" counts useful arithmetic against the speed of a large
matrix product on this machine. DIR gets bench.json and a chart of each table.

`gpu` is a script of its own: no other name stands beside it, and only --out, --minutes and --small are for it. It
measures the following in this order, each in a process of its own:
{}
Each measurement is printed, and is in DIR/gpu.json, as soon as it is made. A part that fails, or takes more than its
share of the minutes, does not stop the others; a part that would begin after the last minute is skipped.

exit codes: 0 done, 2 bad input (one line on stderr says which), 1 an internal failure, or `gpu` measured nothing"""

RESULTS = "bench.json"
MINUTES = 8
# Flags that are not for `gpu`, and their values where they are not given.
_FLAGS_OF_SUBJECTS = {"model": None, "rounds": None, "media": (), "long": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = {name: part.title for name, part in PARTS.items()}
    parser.epilog = EPILOG.format(_list(SUBJECTS), _list(parts))
    parser.add_argument("names", nargs="*", metavar="NAME", help="subjects (default: all), or gpu alone")
    parser.add_argument("--out", default="out/bench", metavar="DIR", help="folder for the results (default: out/bench)")
    parser.add_argument("--model", metavar="NAME", help="model preset: nano, mid, 2b, ... (default: 2b, on a CPU mid)")
    parser.add_argument(
        "--rounds",
        type=number(int, Limits(1, 10_000)),
        metavar="N",
        help=f"measurements of each side (default: {ROUNDS})",
    )
    media_help = "images and videos for processor and loader (default: synthetic)"
    parser.add_argument("--media", nargs="+", type=pathlib.Path, default=(), metavar="FILE", help=media_help)
    parser.add_argument("--long", action="store_true", help="measure also what takes minutes")
    parser.add_argument("--small", action="store_true", help="tiny sizes, one round")
    parser.add_argument(
        "--minutes",
        type=number(float, Limits(above=0, most=10_080)),
        metavar="N",
        help=f"of gpu: ends after N minutes (default: {MINUTES})",
    )


def run(arguments: argparse.Namespace) -> int | None:
    """Measures each subject, prints its table and writes the results after each of them; or runs the script `gpu`."""
    if GPU in arguments.names:
        return _run_gpu(arguments)
    names = _selected_subjects(arguments.names)
    if arguments.minutes is not None:
        raise InputError(f"--minutes {arguments.minutes:g}: is for {GPU} only")
    from vl3_jax.model.config import PRESETS

    if arguments.model not in (None, *PRESETS):
        raise InputError(f"--model {arguments.model}: give one of {', '.join(PRESETS)}")
    for path in arguments.media:
        if not path.is_file():
            raise InputError(f"--media {path}: no such file")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("charts need matplotlib: pip install 'vl3_jax[bench]'")
    folder = _new_folder(arguments.out)
    # JAX and torch share the memory of a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    from vl3_jax import bench
    from vl3_jax.bench.settings import Settings, machine

    settings = Settings(arguments.model, arguments.small, arguments.rounds, arguments.media, arguments.long)
    conditions = ("model", "dtype", "small", "rounds", "peak_flops", "copy_bytes_per_second")
    results = {"machine": machine(), "subjects": names, **{name: getattr(settings, name) for name in conditions}}
    results["tables"] = []
    print(_heading(results))
    for name in names:
        logger.info("%s ...", name)
        table = bench.measure(name, settings)
        print(table.rendered(settings.peak_flops), flush=True)
        table.write_chart(folder / f"{name}.png")
        results["tables"].append(table.as_json(settings.peak_flops))
        (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{folder / RESULTS}, and a chart of each table beside it")
    return None


def _run_gpu(arguments: argparse.Namespace) -> int:
    """Runs the script `gpu`; returns 1 if nothing at all could be measured."""
    if set(arguments.names) != {GPU}:
        raise InputError(f"{GPU} is a script of its own: give no other name beside it")
    for flag, default in _FLAGS_OF_SUBJECTS.items():
        if getattr(arguments, flag) != default:
            raise InputError(f"--{flag}: is not for {GPU}")
    minutes = MINUTES if arguments.minutes is None else arguments.minutes
    from vl3_jax.bench.gpu import script

    folder = _new_folder(arguments.out)
    results = script.run(folder, minutes, arguments.small, functools.partial(print, flush=True))
    warning = "; small sizes: the figures mean nothing" if arguments.small else ""
    print(f"\n{folder / script.RESULTS}, after {results['seconds']:.0f} s{warning}")
    rows = [row for part in results["parts"].values() for row in part["measurements"]]
    return 0 if any("seconds" in row for row in rows) else 1


def _list(descriptions: Mapping[str, str]) -> str:
    """Formats names and their descriptions as indented lines."""
    lines = (f"  {name:10} {text}" for name, text in descriptions.items())
    return "\n".join(textwrap.fill(line, 100, subsequent_indent=" " * 13) for line in lines)


def _new_folder(out: str) -> pathlib.Path:
    folder = pathlib.Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be created ({error.strerror})") from error
    return folder


def _selected_subjects(names: list[str]) -> list[str]:
    """Removes duplicates, in the order given; no names select all subjects."""
    for name in names:
        if name not in SUBJECTS:
            raise InputError(f"no subject {name!r}; there are {', '.join((*SUBJECTS, GPU))}")
    return list(dict.fromkeys(names or SUBJECTS))


def _heading(results: dict) -> str:
    """Describes the machine: device, processor, measured peak rates and versions."""
    machine = results["machine"]
    device = f"{machine['device']}: {machine['processor']}, {machine['cores']} cores"
    compute = f"{results['peak_flops'] / 1e9:,.3g} GFLOP/s in {results['dtype']}"
    bandwidth = f"{results['copy_bytes_per_second'] / 1e9:,.3g} GB/s copied"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    warning = "\nsmall sizes: the figures mean nothing" if results["small"] else ""
    return f"{device}; {compute}, {bandwidth}\n{versions}{warning}"
