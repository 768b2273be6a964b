"""Benchmarks the throughput and the memory of the data loader (`vl3 bench packer` benchmarks the packing).

    python benchmarks/data.py [speed] [memory] [--samples N] [--rounds N] [--threads N]

`speed` reads the images and videos of tests/data, each with a question, through the loader and through the processor of
the transformers port in alternating rounds; then it profiles the loader once in a single thread. `memory` reads 2,000
samples and prints the resident memory of the process after each tenth of them.

The port needs torch, transformers and torchvision. It gets the same frame rate, budgets, merge sizes and pruning. Its
tensors are discarded, whereas the loader packs rows for a training step.
"""

import argparse
import collections
import contextlib
import functools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

from data_pipelines import loader, mixtures
from data_pipelines.loader import BatchBuilder, Loader
from data_pipelines.mixture_dataset import DatasetSpec, MixtureDataset, open_mixture
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.step_plan import StepPlan
from vl3_jax.bench.torchvision_ops import declare_operators
from vl3_jax.processing import chat_template, images, patchify, processor, resize

ROOT = pathlib.Path(__file__).parent.parent
TESTS = ROOT / "tests"
TOKENIZER = TESTS / "data" / "tokenizer"
MEDIA = TESTS / "data" / "media"
VIDEOS = ("bunny_long.mp4", "city_night.mp4", "earth_night.mp4", "squirrel_flight.mp4", "tree.avi")
MEMORY_SAMPLES = 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="speed or memory; both by default")
    parser.add_argument("--samples", type=int, default=48, help="samples that `speed` reads in each round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of `speed`; the best one counts")
    parser.add_argument("--threads", type=int, default=None, help="loader threads (default: all processors)")
    arguments = parser.parse_args()
    for part in arguments.parts or ("speed", "memory"):
        if part == "speed":
            speed(arguments.samples, arguments.rounds, arguments.threads)
        elif part == "memory":
            memory(arguments.threads)
        else:
            parser.error(f"{part}: no such part; choose speed or memory")


def speed(samples: int, rounds: int, threads: int | None) -> None:
    """Prints samples and vision tokens per second of the loader and of the port, and the loader's profile."""
    with tempfile.TemporaryDirectory() as folder:
        records = real_records(samples)
        mixture = real_mixture(pathlib.Path(folder), records)
        runs: dict[str, Callable[[], int]] = {"vl3_jax": lambda: read(mixture, threads)}
        port = port_processing(mixture)
        if port is not None:
            runs["port"] = lambda: sum(map(port, records))
        best: dict[str, tuple[float, int]] = {}
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                vision_tokens = run()
                seconds = time.perf_counter() - start
                best[name] = min(best.get(name, (np.inf, 0)), (seconds, vision_tokens))
        for name, (seconds, vision_tokens) in best.items():
            print(f"{name:8} {samples / seconds:8.1f} samples/s {vision_tokens / seconds:10,.0f} vision tokens/s")
        if "port" in best:
            print(f"ratio    {best['port'][0] / best['vl3_jax'][0]:8.2f}x")
        profile(mixture)


def real_records(count: int) -> list[dict]:
    """Returns records that alternate between images and videos of tests/data, each with a question and an answer."""
    image_names = sorted(path.name for path in (MEDIA / "images").iterdir())
    names = [name for pair in zip(image_names, (*VIDEOS, *VIDEOS), strict=False) for name in pair]
    answer = "Something happens here, and then it goes on for a while, until at last it ends. " * 4
    records = []
    for number in range(count):
        name = names[number % len(names)]
        medium = {"image": [f"images/{name}"]} if name in image_names else {"video": [f"videos/{name}"]}
        turns = [{"from": "human", "value": f"What is shown in part {number}?"}, {"from": "gpt", "value": answer}]
        records.append({**medium, "conversations": turns})
    return records


def real_mixture(folder: pathlib.Path, records: list[dict]) -> MixtureDataset:
    """Indexes the records with the settings of stage 4."""
    path = folder / "real.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = mixtures.data_settings(mixtures.load("data/stage4"))
    return open_mixture([DatasetSpec("real", (str(path),), str(MEDIA))], SampleBuilder(TOKENIZER, settings), build=True)


def read(mixture: MixtureDataset, threads: int | None) -> int:
    """Reads an epoch and returns the number of its vision tokens."""
    with Loader(mixture, 1, threads=threads) as batches:
        return sum(int((batch.arrays["vision_slot"] >= 0).sum()) for batch in batches)


def port_processing(mixture: MixtureDataset) -> Callable[[dict], int] | None:
    """Returns a function that processes a record with the port and returns its vision tokens.

    Returns None if the port is not installed.
    """
    try:
        declare_operators()
        from PIL import Image
        from transformers import PreTrainedTokenizerFast
        from transformers.models.video_llama_3.image_processing_video_llama_3 import VideoLlama3ImageProcessor
        from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor
        from transformers.models.video_llama_3.video_processing_video_llama_3 import VideoLlama3VideoProcessor
        from transformers.video_utils import load_video
    except ImportError as error:
        print(f"the transformers port is not installed ({error}): only vl3_jax is measured", file=sys.stderr)
        return None
    settings = mixture.settings.processor
    size = {"shortest_edge": 16 * 784, "longest_edge": settings.max_tokens * 784}
    grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    frames = {"max_frames": settings.max_frames, "min_frames": 4, "use_token_compression": True}
    port = VideoLlama3Processor(
        image_processor=VideoLlama3ImageProcessor(size=size, merge_size=settings.image_merge, **grey),
        video_processor=VideoLlama3VideoProcessor(size=size, merge_size=settings.video_merge, **frames, **grey),
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER / "tokenizer.json")),
    )
    sample_indices = functools.partial(port.video_processor.sample_frames, fps=settings.fps)

    def run(record: dict) -> int:
        question, answer = (turn["value"] for turn in record["conversations"])
        kind = "image" if "image" in record else "video"
        path = MEDIA / record[kind][0]
        text = f"<|im_start|>user\n<|{kind}_pad|>\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        if kind == "image":
            inputs = port(text=[text], images=[Image.open(path).convert("RGB")], return_tensors="pt")
            return int(inputs["image_grid_thw"][0].prod()) // settings.image_merge**2
        video, metadata = load_video(str(path), backend="pyav", sample_indices_fn=sample_indices)
        inputs = port(
            text=[text], videos=[video], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
        )
        return int(inputs["video_compression_mask"].sum())

    return run


def profile(mixture: MixtureDataset) -> None:
    """Prints the share of CPU time of each kind of work over one epoch."""
    step_plan = StepPlan(mixture, 1)
    build_batch = BatchBuilder(mixture, step_plan, slice(0, 1))
    start = time.process_time()
    with timed_parts() as cpu_times:
        for step in range(len(step_plan)):
            build_batch(step)
    total = time.process_time() - start
    cpu_times["rest"] = total - sum(cpu_times.values())
    print("CPU time:", ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in cpu_times.items()))


@contextlib.contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Context in which the CPU time of each kind of work is accumulated, in seconds by name."""
    cpu_times: collections.Counter[str] = collections.Counter()
    originals = []

    def time_calls(owner, attribute: str, name: str) -> None:
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*args, **kwargs):
            start = time.thread_time()
            result = original(*args, **kwargs)
            cpu_times[name] += time.thread_time() - start
            return result

        setattr(owner, attribute, timed)
        originals.append((owner, attribute, original))

    decode_frames = processor.Processor._decode_frames

    def timed_frames(self, reader):
        frames = decode_frames(self, reader)
        while True:
            start = time.thread_time()
            frame = next(frames, None)
            cpu_times["decode"] += time.thread_time() - start
            if frame is None:
                return
            yield frame

    processor.Processor._decode_frames = timed_frames
    time_calls(images.ImageReader, "load", "decode")
    time_calls(resize, "resize_image", "resize")
    time_calls(patchify, "patchify", "patchify")
    time_calls(patchify, "pruning_mask", "mask")
    time_calls(chat_template, "render", "tokenise")
    time_calls(loader, "pack", "pack")
    try:
        yield cpu_times
    finally:
        processor.Processor._decode_frames = decode_frames
        for owner, attribute, original in originals:
            setattr(owner, attribute, original)


def memory(threads: int | None) -> None:
    """Prints the resident memory after each tenth of the samples."""
    with tempfile.TemporaryDirectory() as folder:
        mixture = real_mixture(pathlib.Path(folder), real_records(MEMORY_SAMPLES))
        seen, sizes = 0, []
        with Loader(mixture, 1, threads=threads) as batches:
            for batch in batches:
                seen += int((batch.samples >= 0).sum())
                if seen >= (len(sizes) + 1) * MEMORY_SAMPLES // 10:
                    sizes.append(resident_memory())
    print(f"resident MB after each tenth of {seen:,} samples:", *(f"{size / 1e6:.0f}" for size in sizes))


def resident_memory() -> int:
    """Returns the resident memory of this process in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024


if __name__ == "__main__":
    main()
