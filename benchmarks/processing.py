"""Compares the speed of the processor with that of the transformers port, and measures the memory of a one-hour video.

    python benchmarks/processing.py [MEDIA ...] [--rounds N] [--skip-hour] [--clip FILE]

MEDIA are images and videos (default: those of tests/data). Both processors run in one process, in turns. The table
gives the best of N rounds for each: sampled frames (or images) per second, and the ratio of the native mode to the
port. Both sides sample one frame per second, resize, cut patches and compute the pruning mask; the processor also
renders the prompt. The port needs torch, transformers and torchvision (`pip install --no-deps torchvision` beside a
CPU torch).

The one-hour video is `--clip` scaled to 1280 x 720, encoded once, with its packets repeated, in a temporary folder.
It is processed in a child process, whose peak memory is reported above its idle memory.
"""

import argparse
import functools
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction

import av

from vl3_jax.bench.bench_processor import count_frames, process, reference_processing
from vl3_jax.errors import InputError
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.tokenizer import Tokenizer

TESTS = pathlib.Path(__file__).parent.parent / "tests"
TOKENIZER = TESTS / "data" / "tokenizer"
HOUR = 3600
MEMORY_LIMIT = 600e6  # target, in bytes above idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("media", nargs="*", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-hour", action="store_true")
    parser.add_argument(
        "--clip", dest="video", metavar="FILE", type=pathlib.Path, default=TESTS / "data/media/edge/city_vp9.webm"
    )
    parser.add_argument("--measure", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print_memory(arguments.measure)
        return
    default = [path for path in sorted((TESTS / "data/media").glob("*/*")) if path.suffix != ".gif"]
    compare([path for path in arguments.media or default if readable(path)], arguments.rounds)
    if not arguments.skip_hour:
        measure_hour(arguments.video)


def readable(path: pathlib.Path) -> bool:
    """Returns whether the processor can read the file."""
    try:
        count_frames(Processor(Tokenizer.from_folder(TOKENIZER)), path)
    except InputError:
        return False
    return True


def compare(media: list[pathlib.Path], rounds: int) -> None:
    """Runs the processor and the port in turns and prints the best of `rounds` for each file."""
    port, missing = reference_processing()
    if missing:
        print(f"{missing}: only the speed of the processor is measured", file=sys.stderr)
    tokenizer = Tokenizer.from_folder(TOKENIZER)
    modes = {mode: Processor(tokenizer, ProcessorConfig(preprocess=mode)) for mode in ("official", "native")}
    headers = ("frames", "official/s", "native/s", "port/s", "native : port")
    print(f"{'file':28}", *(f"{header:>14}" for header in headers))
    for path in media:
        runs: dict[str, Callable[[], int]] = {
            mode: functools.partial(count_frames, processor, path) for mode, processor in modes.items()
        }
        if port is not None:
            runs["port"] = functools.partial(port, path)
        speeds, frames = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0)
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                try:
                    frames[name] = run()
                except Exception as error:  # the port cannot read every file
                    print(f"  {name} on {path.name}: {' '.join(str(error).split())[:80]}", file=sys.stderr)
                    continue
                speeds[name] = max(speeds[name], frames[name] / (time.perf_counter() - start))
        port_speed = speeds.get("port", 0.0)
        ratio = f"{speeds['native'] / port_speed:13.2f}x" if port_speed else f"{'-':>14}"
        own = f"{speeds['official']:14.1f} {speeds['native']:14.1f}"
        print(f"{path.name:28} {frames['native']:14} {own} {port_speed:14.1f} {ratio}")


def measure_hour(video: pathlib.Path) -> None:
    """Generates a video of one hour at 720p, and prints the peak memory and time of its processing."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "hour.mp4"
        write_hour(video, path)
        print(f"\none hour at 1280 x 720, {path.stat().st_size / 1e6:.0f} MB")
        subprocess.run([sys.executable, os.fspath(__file__), "--measure", os.fspath(path)], check=True)


def write_hour(video: pathlib.Path, path: pathlib.Path) -> None:
    """Encodes `video` once at 720p and 25 frames per second, and repeats its packets for an hour."""
    with av.open(os.fspath(video)) as source:
        frames = [frame.reformat(1280, 720, "yuv420p") for frame in source.decode(video=0)]
    once = io.BytesIO()
    with av.open(once, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": "28", "g": "250"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 25)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    length = Fraction(len(frames), 25)
    with av.open(os.fspath(path), "w") as target:
        for repeat in range(int(HOUR / length) + 1):
            once.seek(0)
            with av.open(once) as source:
                original = source.streams.video[0]
                if not repeat:
                    stream = target.add_stream_from_template(original)
                shift = int(repeat * length / original.time_base)
                for packet in source.demux(original):
                    if packet.size:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                        target.mux(packet)


def print_memory(path: pathlib.Path) -> None:
    """Prints how much processing a file adds to the peak memory; runs in a process of its own."""
    processor = Processor(Tokenizer.from_folder(TOKENIZER))
    process(processor, TESTS / "data/media/videos/tree.avi")  # libraries loaded, codecs opened once
    idle = peak_memory()
    start = time.perf_counter()
    processed = process(processor, path)
    seconds = time.perf_counter() - start
    added = peak_memory() - idle
    (frames,) = processed.videos
    print(
        f"{len(frames.indices)} frames, {processed.visual_tokens} tokens, {seconds:.1f} s, "
        f"peak {added / 1e6:.0f} MB above idle ({idle / 1e6:.0f} MB); target {MEMORY_LIMIT / 1e6:.0f} MB"
    )


def peak_memory() -> int:
    """Returns the peak memory of this process in bytes.

    It is not read from getrusage, where a child inherits the peak of its parent.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


if __name__ == "__main__":
    main()
