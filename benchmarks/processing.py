"""Speed of the processor beside the transformers port's on the same media, and memory of a one-hour video.

    python benchmarks/processing.py [MEDIA ...] [--rounds N] [--skip-hour] [--clip FILE]

MEDIA are pictures and videos (default: those of tests/data). Both processors run in one process, in turns; the table
gives the best of N rounds for each: frames (or pictures) shown per second, and ours as a multiple of theirs. Both
sample one frame per second, resize, cut patches and compute the pruning mask; ours also renders the prompt. The port
needs torch, transformers and torchvision (`pip install --no-deps torchvision` beside a CPU torch).

The one-hour video is `--clip` scaled to 1280 x 720, encoded once, and its packets repeated; it lies in a temporary
folder. Its processing runs in a child, whose peak is given above what it held before.
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

from vl3_jax.bench.bench_processor import ask, port, shown
from vl3_jax.errors import InputError
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.tokenizer import Tokenizer

TESTS = pathlib.Path(__file__).parent.parent / "tests"
TOKENIZER = TESTS / "data" / "tokenizer"
HOUR = 3600
MEMORY_AIM = 600e6  # bytes above idle


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("media", nargs="*", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-hour", action="store_true")
    parser.add_argument("--clip", type=pathlib.Path, default=TESTS / "data/media/edge/city_vp9.webm")
    parser.add_argument("--measure", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print_memory(arguments.measure)
        return
    default = [path for path in sorted((TESTS / "data/media").glob("*/*")) if path.suffix != ".gif"]
    compare([path for path in arguments.media or default if readable(path)], arguments.rounds)
    if not arguments.skip_hour:
        hour(arguments.clip)


def readable(path: pathlib.Path) -> bool:
    """Whether there is anything to compare."""
    try:
        shown(Processor(Tokenizer.from_folder(TOKENIZER)), path)
    except InputError:
        return False
    return True


def compare(media: list[pathlib.Path], rounds: int) -> None:
    """Ours and theirs in turns, best of `rounds` each."""
    theirs, missing = port()
    if missing:
        print(f"{missing}: only our own speed", file=sys.stderr)
    tokenizer = Tokenizer.from_folder(TOKENIZER)
    modes = {mode: Processor(tokenizer, ProcessorConfig(preprocess=mode)) for mode in ("official", "native")}
    heads = ("frames", "official/s", "native/s", "port/s", "native : port")
    print(f"{'medium':28}", *(f"{head:>14}" for head in heads))
    for path in media:
        runs: dict[str, Callable[[], int]] = {
            mode: functools.partial(shown, processor, path) for mode, processor in modes.items()
        }
        if theirs is not None:
            runs["port"] = functools.partial(theirs, path)
        speeds, frames = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0)
        for _ in range(rounds):
            for name, run in runs.items():
                begin = time.perf_counter()
                try:
                    frames[name] = run()
                except Exception as error:  # the port cannot read every file
                    print(f"  {name} on {path.name}: {' '.join(str(error).split())[:80]}", file=sys.stderr)
                    continue
                speeds[name] = max(speeds[name], frames[name] / (time.perf_counter() - begin))
        other = speeds.get("port", 0.0)
        ratio = f"{speeds['native'] / other:13.2f}x" if other else f"{'-':>14}"
        ours = f"{speeds['official']:14.1f} {speeds['native']:14.1f}"
        print(f"{path.name:28} {frames['native']:14} {ours} {other:14.1f} {ratio}")


def hour(clip: pathlib.Path) -> None:
    """Peak memory and time of one hour at 720p."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "hour.mp4"
        write_hour(clip, path)
        print(f"\none hour at 1280 x 720, {path.stat().st_size / 1e6:.0f} MB")
        subprocess.run([sys.executable, os.fspath(__file__), "--measure", os.fspath(path)], check=True)


def write_hour(clip: pathlib.Path, path: pathlib.Path) -> None:
    """Encodes `clip` once at 720p and 25 frames per second, and repeats its packets for an hour."""
    with av.open(os.fspath(clip)) as source:
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
    """In a child of its own: what processing adds to the peak."""
    processor = Processor(Tokenizer.from_folder(TOKENIZER))
    ask(processor, TESTS / "data/media/videos/tree.avi")  # libraries loaded, codecs opened once
    idle = peak_memory()
    begin = time.perf_counter()
    processed = ask(processor, path)
    seconds = time.perf_counter() - begin
    above = peak_memory() - idle
    (video,) = processed.videos
    print(
        f"{len(video.indices)} frames, {processed.visual_tokens} tokens, {seconds:.1f} s, "
        f"peak {above / 1e6:.0f} MB above idle ({idle / 1e6:.0f} MB); aim {MEMORY_AIM / 1e6:.0f} MB"
    )


def peak_memory() -> int:
    """Bytes. Not from getrusage: there a child inherits its parent's peak."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


if __name__ == "__main__":
    main()
