"""Conversion of a checkpoint as `vl3 convert` does it, against a plain copy of the same files.

A random bfloat16 checkpoint is converted official -> Orbax -> native, in child processes. All files are in a temporary
folder (TMPDIR) and take at most four times the size of the checkpoint. Of the 7B, the tower and the decoder have two
layers.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import statistics
import tempfile

import numpy as np

from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.bench.timing import ProcessUsage, results_in_turns, run_python, seconds_of
from vl3_jax.checkpoint.export import plan_shards
from vl3_jax.checkpoint.hf_config import text_section, vision_section
from vl3_jax.checkpoint.names import name_map
from vl3_jax.checkpoint.tensors import FLOATS
from vl3_jax.model import ModelConfig

COPY = "plain copy"
LIMIT = 1.5e9  # bytes of anonymous memory allowed in addition to the largest source tensor


def measure(settings: Settings) -> Table:
    """Measures both directions; `start-up s` is the part of each conversion that is Python's start."""
    config = settings.config
    if settings.model == "7b":
        vision, text = (dataclasses.replace(part, num_layers=2) for part in (config.vision, config.text))
        config = dataclasses.replace(config, vision=vision, text=text)
    largest = max(spec.size for spec in name_map("official", config).tensors.values()) * 2
    startup = run_python("-c", "import vl3_jax.checkpoint").seconds
    rows = []
    with tempfile.TemporaryDirectory(prefix="vl3-conversion-") as folder:
        official, orbax, native = (pathlib.Path(folder) / name for name in ("official", "orbax", "native"))
        gigabytes = write_random_checkpoint(official, config) / 1e9
        for case, source, target, arguments in (
            ("official -> Orbax", official, orbax, ("hf", str(official), str(orbax))),
            ("Orbax -> native", orbax, native, ("export", str(orbax), str(native), "--format", "native")),
        ):
            sides = {
                OURS: functools.partial(_convert, target, arguments),
                COPY: functools.partial(_copy, source, pathlib.Path(folder) / "copy"),
            }
            for side, usages in results_in_turns(sides, min(settings.rounds, 3), warm=False).items():
                seconds, cpu_seconds = (statistics.median(usage[i] for usage in usages) for i in (0, 1))
                peak = max(usage.peak_bytes for usage in usages)
                figures = {"start-up s": startup, "CPU s": cpu_seconds, "peak MB": peak / 1e6}
                figures |= {"limit MB": (LIMIT + largest) / 1e6}
                rows.append(Row(case, side, seconds, gigabytes, "GB", None, figures if side == OURS else {}))
    exceeded = any(row.figures and row.figures["peak MB"] > row.figures["limit MB"] for row in rows)
    notes = ("the memory exceeds its limit",) if exceeded else ()
    title = f"{settings.model}, bfloat16, {gigabytes:.3g} GB, largest tensor {largest / 1e9:.3g} GB"
    return Table("conversion", title, rows, notes)


def write_random_checkpoint(folder: pathlib.Path, config: ModelConfig) -> int:
    """Writes random finite bfloat16 weights in the official layout and returns their size in bytes."""
    folder.mkdir()
    names = name_map("official", config)
    dtypes = dict.fromkeys(names.leaves, FLOATS["bfloat16"])
    rng = np.random.default_rng(0)
    # Clearing the top exponent bit keeps every value finite. The same block of noise is written repeatedly.
    noise = (rng.integers(0, 2**16, 2**25, np.uint16) & 0xBFFF).tobytes()
    shards = plan_shards(list(names.tensors.values()), dtypes, 5 * 10**9)
    for shard in shards:
        with open(folder / shard.name, "wb") as file:
            file.write(shard.header)
            remaining = shard.size - len(shard.header)
            while remaining:
                remaining -= file.write(noise[: min(remaining, len(noise))])
    if len(shards) > 1:
        weight_map = {spec.name: shard.name for shard in shards for spec in shard.tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    content = {
        "model_type": "videollama3_qwen2",
        "torch_dtype": "bfloat16",
        "image_token_index": 151_665,
        "mm_projector_type": "mlp2x_gelu",
        "vision_encoder_config": vision_section(config),
        **text_section(config),
    }
    (folder / "config.json").write_text(json.dumps(content))
    return sum(shard.size for shard in shards)


def _convert(target: pathlib.Path, arguments: tuple[str, ...]) -> ProcessUsage:
    shutil.rmtree(target, ignore_errors=True)
    return run_python("-m", "vl3_jax.cli.main", "convert", *arguments)


def _copy(source: pathlib.Path, target: pathlib.Path) -> ProcessUsage:
    seconds = seconds_of(lambda: shutil.copytree(source, target))
    shutil.rmtree(target)
    return ProcessUsage(seconds, seconds, 0)
