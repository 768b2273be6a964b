"""Data pipelines: how fast samples are read, and whether memory stays flat (`vl3 bench packer` plans rows).

    python benchmarks/data.py [speed] [memory] [--samples N] [--rounds N] [--threads N]

`speed` reads real pictures and videos (those of tests/data) with questions through the loader, and
the same samples through the transformers port's processor, in turns; then once in one thread, to tell where the time
goes. `memory` reads 2,000 samples and prints the process's resident memory on the way.

The port needs torch, transformers and torchvision. It gets the same frame rate, budgets, merge sizes and pruning, and
its tensors are thrown away; the loader packs rows that a training step could take.
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

from data_pipelines import loader as loading
from data_pipelines import mixtures
from data_pipelines.loader import BatchBuilder, Loader
from data_pipelines.mixture_dataset import DatasetSpec, MixtureDataset, open_mixture
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.step_plan import StepPlan
from vl3_jax import config_file
from vl3_jax.bench.torchvision_ops import declare_operators
from vl3_jax.processing import chat_template, images, patchify, processor, resize

ROOT = pathlib.Path(__file__).parent.parent
TESTS = ROOT / "tests"
TOKENIZER = TESTS / "data" / "tokenizer"
MEDIA = TESTS / "data" / "media"
VIDEOS = ("bunny_long.mp4", "city_night.mp4", "earth_night.mp4", "squirrel_flight.mp4", "tree.avi")
MEMORY_SAMPLES = 2_000


def main() -> None:
    """Runs the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="speed, memory; both if none is named")
    parser.add_argument("--samples", type=int, default=48, help="read by `speed` in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    for part in arguments.parts or ("speed", "memory"):
        if part == "speed":
            speed(arguments.samples, arguments.rounds, arguments.threads)
        elif part == "memory":
            memory(arguments.threads)
        else:
            parser.error(f"{part}: no such part; choose speed or memory")


def speed(samples: int, rounds: int, threads: int | None) -> None:
    """Samples and vision tokens per second beside the port, and where the time goes."""
    with tempfile.TemporaryDirectory() as folder:
        records = real_records(samples)
        mixture = real_corpus(pathlib.Path(folder), records)
        runs: dict[str, Callable[[], int]] = {"vl3_jax": lambda: read(mixture, threads)}
        port = reference(mixture)
        if port is not None:
            runs["port"] = lambda: sum(map(port, records))
        best: dict[str, tuple[float, int]] = {}
        for _ in range(rounds):
            for name, run in runs.items():
                begin = time.perf_counter()
                vision = run()
                seconds = time.perf_counter() - begin
                best[name] = min(best.get(name, (np.inf, 0)), (seconds, vision))
        for name, (seconds, vision) in best.items():
            print(f"{name:8} {samples / seconds:8.1f} samples/s {vision / seconds:10,.0f} vision tokens/s")
        if "port" in best:
            print(f"ratio    {best['port'][0] / best['vl3_jax'][0]:8.2f}x")
        shares(mixture)


def real_records(count: int) -> list[dict]:
    """Pictures and videos of tests/data in turn, each with a question and an answer."""
    pictures = sorted(path.name for path in (MEDIA / "images").iterdir())
    names = [name for pair in zip(pictures, (*VIDEOS, *VIDEOS), strict=False) for name in pair]
    answer = "Something happens here, and then it goes on for a while, until at last it ends. " * 4
    records = []
    for number in range(count):
        name = names[number % len(names)]
        medium = {"image": [f"images/{name}"]} if name in pictures else {"video": [f"videos/{name}"]}
        turns = [{"from": "human", "value": f"What is shown in part {number}?"}, {"from": "gpt", "value": answer}]
        records.append({**medium, "conversations": turns})
    return records


def real_corpus(folder: pathlib.Path, records: list[dict]) -> MixtureDataset:
    """Indexed, with the settings of stage 4."""
    path = folder / "real.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = mixtures.data_settings(config_file.load(str(ROOT / "configs/data/stage4.py")))
    return open_mixture([DatasetSpec("real", (str(path),), str(MEDIA))], SampleBuilder(TOKENIZER, settings), build=True)


def read(mixture: MixtureDataset, threads: int | None) -> int:
    """Reads an epoch; returns its vision tokens."""
    with Loader(mixture, 1, threads=threads) as batches:
        return sum(int((batch.arrays["vision_slot"] >= 0).sum()) for batch in batches)


def reference(mixture: MixtureDataset) -> Callable[[dict], int] | None:
    """The port's processing of one record, returning its vision tokens; None where it is not installed."""
    try:
        declare_operators()
        from PIL import Image
        from transformers import PreTrainedTokenizerFast
        from transformers.models.video_llama_3.image_processing_video_llama_3 import VideoLlama3ImageProcessor
        from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor
        from transformers.models.video_llama_3.video_processing_video_llama_3 import VideoLlama3VideoProcessor
        from transformers.video_utils import load_video
    except ImportError as error:
        print(f"the port is not here ({error}): only our own speed", file=sys.stderr)
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
    choose = functools.partial(port.video_processor.sample_frames, fps=settings.fps)

    def run(record: dict) -> int:
        question, answer = (turn["value"] for turn in record["conversations"])
        kind = "image" if "image" in record else "video"
        path = MEDIA / record[kind][0]
        text = f"<|im_start|>user\n<|{kind}_pad|>\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        if kind == "image":
            inputs = port(text=[text], images=[Image.open(path).convert("RGB")], return_tensors="pt")
            return int(inputs["image_grid_thw"][0].prod()) // settings.image_merge**2
        video, metadata = load_video(str(path), backend="pyav", sample_indices_fn=choose)
        inputs = port(
            text=[text], videos=[video], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
        )
        return int(inputs["video_compression_mask"].sum())

    return run


def shares(mixture: MixtureDataset) -> None:
    """Processor time of each kind of work, over one epoch."""
    schedule = StepPlan(mixture, 1)
    assemble = BatchBuilder(mixture, schedule, slice(0, 1))
    begin = time.process_time()
    with timed_parts() as spent:
        for step in range(len(schedule)):
            assemble(step)
    total = time.process_time() - begin
    spent["rest"] = total - sum(spent.values())
    print("processor time:", ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in spent.items()))


@contextlib.contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """While open, adds up the processor time of the thread that runs each kind of work."""
    spent: collections.Counter[str] = collections.Counter()
    undo = []

    def watch(owner, attribute: str, name: str) -> None:
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*args, **kwargs):
            begin = time.thread_time()
            result = original(*args, **kwargs)
            spent[name] += time.thread_time() - begin
            return result

        setattr(owner, attribute, timed)
        undo.append((owner, attribute, original))

    watched = processor.Processor._watched

    def timed_frames(self, clip):
        frames = watched(self, clip)
        while True:
            begin = time.thread_time()
            frame = next(frames, None)
            spent["decode"] += time.thread_time() - begin
            if frame is None:
                return
            yield frame

    processor.Processor._watched = timed_frames
    watch(images.ImageReader, "load", "decode")
    watch(resize, "resize_image", "resize")
    watch(patchify, "patchify", "patchify")
    watch(patchify, "pruning_mask", "mask")
    watch(chat_template, "render", "tokenise")
    watch(loading, "pack", "assemble")
    try:
        yield spent
    finally:
        processor.Processor._watched = watched
        for owner, attribute, original in undo:
            setattr(owner, attribute, original)


def memory(threads: int | None) -> None:
    """Resident memory after each tenth of the samples."""
    with tempfile.TemporaryDirectory() as folder:
        mixture = real_corpus(pathlib.Path(folder), real_records(MEMORY_SAMPLES))
        seen, marks = 0, []
        with Loader(mixture, 1, threads=threads) as batches:
            for batch in batches:
                seen += int((batch.samples >= 0).sum())
                if seen >= (len(marks) + 1) * MEMORY_SAMPLES // 10:
                    marks.append(resident())
    print(f"resident MB after each tenth of {seen:,} samples:", *(f"{mark / 1e6:.0f}" for mark in marks))


def resident() -> int:
    """Bytes of this process in memory."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024


if __name__ == "__main__":
    main()
