"""Measures time and memory of `vl3 convert` at full size, compared with a plain copy of the same files.

    python benchmarks/conversion.py [2b] [7b-two-layers] [--folder DIR] [--rounds N]

Writes a random bfloat16 checkpoint to a temporary folder (2b: 3.9 GB, 7b-two-layers: 3.2 GB; at most four times that
much disk space is used), converts official -> Orbax -> native in child processes, and prints for each direction the
median seconds, GB/s, the speed relative to the copy, and the peak of the child's anonymous memory (RssAnon, sampled).
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from vl3_jax.checkpoint.export import plan_shards
from vl3_jax.checkpoint.hf_config import text_section, vision_section
from vl3_jax.checkpoint.names import name_map
from vl3_jax.checkpoint.tensors import FLOATS
from vl3_jax.model.config import ModelConfig, preset

LIMIT = 1.5e9  # bytes of anonymous memory allowed in addition to the largest source tensor


def model_config(name: str) -> ModelConfig:
    """Returns the 2B as released, or the 7B with two layers in the tower and in the decoder."""
    if name == "2b":
        return preset("2b")
    config = preset("7b")
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_layers=2),
        text=dataclasses.replace(config.text, num_layers=2),
    )


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


def timed_copy(source: pathlib.Path, target: pathlib.Path) -> float:
    """Returns the seconds that a plain copy of a folder takes; removes the copy."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def anonymous_bytes(pid: int) -> int:
    """Returns the current RssAnon of a process in bytes, or 0 if it has ended."""
    try:
        for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def run_measured(arguments: list[str]) -> tuple[float, float, int]:
    """Runs `python arguments` in a child process.

    Returns:
      Seconds, CPU seconds, and the peak RssAnon in bytes.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"python {' '.join(arguments)} failed with {child.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def bench(name: str, parent: pathlib.Path | None, rounds: int) -> bool:
    """Benchmarks one model in both directions; returns whether memory stayed below the limit."""
    config = model_config(name)
    largest = max(spec.size for spec in name_map("official", config).tensors.values()) * 2
    startup, _, _ = run_measured(["-c", "import vl3_jax.checkpoint"])
    within_limit = True
    with tempfile.TemporaryDirectory(prefix="vl3-conversion-", dir=parent) as temporary:
        folder = pathlib.Path(temporary)
        official, orbax, native = folder / "official", folder / "orbax", folder / "native"
        nbytes = write_random_checkpoint(official, config)
        print(
            f"{name}: {nbytes / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, {os.cpu_count()} cores; "
            f"median of {rounds} rounds; {startup:.1f} s of each conversion are Python start-up"
        )
        for title, source, target, arguments in (
            ("official -> Orbax", official, orbax, ["hf", str(official), str(orbax)]),
            ("Orbax -> native", orbax, native, ["export", str(orbax), str(native), "--format", "native"]),
        ):
            copies, conversions, cpu_times, peak = [], [], [], 0
            for _ in range(rounds):
                shutil.rmtree(target, ignore_errors=True)
                copies.append(timed_copy(source, folder / "copy"))
                seconds, cpu_seconds, anonymous = run_measured(["-m", "vl3_jax.cli.main", "convert", *arguments])
                conversions.append(seconds)
                cpu_times.append(cpu_seconds)
                peak = max(peak, anonymous)
            copy, seconds = statistics.median(copies), statistics.median(conversions)
            within_limit &= peak <= LIMIT + largest
            print(
                f"  {title:18} {seconds:5.1f} s {nbytes / 1e9 / seconds:5.2f} GB/s; plain copy {copy:5.1f} s "
                f"{nbytes / 1e9 / copy:5.2f} GB/s; {copy / seconds:.2f}x the speed of the copy, "
                f"{copy / (seconds - startup):.2f}x without start-up; peak RssAnon {peak / 1e9:.2f} GB "
                f"(limit {(LIMIT + largest) / 1e9:.2f})",
                flush=True,
            )
            print(
                f"    all: conversions {_format_seconds(conversions)} s (CPU {_format_seconds(cpu_times)} s), "
                f"copies {_format_seconds(copies)} s",
                flush=True,
            )
    return within_limit


def _format_seconds(seconds: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in seconds)


def main() -> int:
    """Runs the benchmarks; returns 1 if a conversion exceeded the memory limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=["2b", "7b-two-layers", []], help="default: both")
    parser.add_argument("--folder", type=pathlib.Path, help="parent of the temporary folder (default: the system's)")
    parser.add_argument("--rounds", type=int, default=3, help="number of copies and conversions (default 3)")
    arguments = parser.parse_args()
    results = [bench(name, arguments.folder, arguments.rounds) for name in arguments.models or ["2b", "7b-two-layers"]]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
