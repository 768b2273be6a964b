"""`vl3 bench`: how fast this machine is, beside plain forms of the same work and beside transformers."""

import argparse
import json
import os
import pathlib
import sys

from vl3_jax.bench import GROUPS, SUBJECTS
from vl3_jax.errors import InputError

EPILOG = """examples:
  vl3 bench                                  all of it: half an hour on a small CPU
  vl3 bench tower prefill --model 2b
  vl3 bench gpu --out RUNS/bench             a step's utilisation, and decoding's share of the bandwidth
  vl3 bench --small                          tiny sizes: whether all of it runs; the figures mean nothing

subjects:
{}

All sides of a case are measured in turns, in one run; times are medians. Weights are random. Where torch and
transformers are installed, their video_llama_3 with the same weights is one of the sides. "x ours" is the time that a
side takes for the same amount, in multiples of ours; "of peak" counts useful arithmetic against the speed of a large
matrix product on this machine. DIR gets bench.json and a picture of each table.

exit codes: 0 done, 2 bad input (one line on stderr says which), 1 a failure of ours"""

RESULTS = "bench.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    listed = {**SUBJECTS, **{name: f"{' and '.join(members)}" for name, members in GROUPS.items()}}
    parser.epilog = EPILOG.format("\n".join(f"  {name:10} {what}" for name, what in listed.items()))
    parser.add_argument("names", nargs="*", metavar="NAME", help="subjects (default: all)")
    parser.add_argument("--out", default="out/bench", metavar="DIR", help="for the results (default: out/bench)")
    parser.add_argument("--model", metavar="NAME", help="sizes: nano, mid, 2b, ... (default: 2b, on a CPU mid)")
    parser.add_argument("--rounds", type=int, metavar="N", help="measurements of each side (default: 5)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, one round")


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes, table by table."""
    names = _chosen(arguments.names)
    if arguments.rounds is not None and arguments.rounds < 1:
        raise InputError(f"--rounds {arguments.rounds}: give 1 or more")
    _check_model(arguments.model)
    from vl3_jax.bench import chart

    chart.check()
    folder = pathlib.Path(arguments.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made ({error.strerror})") from error
    # Two frameworks share the memory of a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    from vl3_jax import bench
    from vl3_jax.bench.machine import machine
    from vl3_jax.bench.settings import make_settings

    settings = make_settings(arguments.model, arguments.small, arguments.rounds)
    found = {
        "machine": machine(),
        "subjects": names,
        "model": settings.model,
        "dtype": settings.dtype,
        "small": settings.small,
        "rounds": settings.rounds,
        "peak_flops": settings.peak,
        "copy_bytes_per_second": settings.bandwidth,
        "tables": [],
    }
    print(_heading(found))
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        table = bench.measure(name, settings)
        print(table.rendered(settings.peak), flush=True)
        chart.write(table, folder / f"{name}.png")
        found["tables"].append(table.as_json(settings.peak))
        (folder / RESULTS).write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{folder / RESULTS}, and a picture of each table beside it")


def _chosen(names: list[str]) -> list[str]:
    """Subjects in the order asked for, groups taken apart, each once."""
    known = {**{name: (name,) for name in SUBJECTS}, **GROUPS}
    for name in names:
        if name not in known:
            raise InputError(f"no subject {name!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(subject for name in names or SUBJECTS for subject in known[name]))


def _check_model(name: str | None) -> None:
    from vl3_jax.model.config import PRESETS

    if name is not None and name not in PRESETS:
        raise InputError(f"--model {name}: give one of {', '.join(PRESETS)}")


def _heading(found: dict) -> str:
    here = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    rates = f"{found['peak_flops'] / 1e9:,.3g} GFLOP/s in {found['dtype']}"
    copied = f"{found['copy_bytes_per_second'] / 1e9:,.3g} GB/s copied"
    lines = [f"{here['device']}: {here['processor']}, {here['cores']} cores; {rates}, {copied}", versions]
    return "\n".join([*lines, *(["small sizes: the figures mean nothing"] if found["small"] else [])])
