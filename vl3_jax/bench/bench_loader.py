"""The data loader over images and videos with questions, against one thread and against transformers' processors.

The settings are those of stage 4. The loader also tokenises the text and packs the rows of a training step;
transformers gets the same frame rate, budget, merge sizes and pruning, and its tensors are discarded.
"""

import collections
import contextlib
import functools
import itertools
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator
from unittest import mock

from data_pipelines import loader
from data_pipelines.loader import BatchBuilder, Loader
from data_pipelines.mixture_dataset import DatasetSpec, MixtureDataset, open_mixture
from data_pipelines.mixtures import data_settings, mixture
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.bench.bench_processor import first_results, is_video, media_files
from vl3_jax.bench.inputs import build_reference
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, REFERENCE, Row, Table
from vl3_jax.bench.timing import measure_case, process_memory
from vl3_jax.processing import chat_template, images, patchify, processor, pruning, resize

ONE_THREAD = "one thread"
_ANSWER = "Something happens here, and then it goes on for a while, until at last it ends. " * 4
_TENTHS = 10


def measure(settings: Settings) -> Table:
    """Measures an epoch; the figures of one thread are the shares of CPU time of each kind of work."""
    count = settings.pick(4, 48, 48)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        files = list(media_files(settings, folder).values())
        chosen = alternating(files, count)
        dataset = open_dataset(folder, chosen)
        theirs, notes = build_reference(lambda module: module.media_processing(dataset.settings.processor))
        shares: dict[str, float] = {}
        one_thread = functools.partial(read_in_one_thread, dataset, shares)
        sides = {OURS: functools.partial(read_with_loader, dataset), ONE_THREAD: one_thread}
        if theirs is not None:
            sides[REFERENCE] = lambda: sum(theirs(path, is_video(path))[1] for path in chosen)
        vision_tokens, failures = first_results("the media", sides)

        def figures(side: str, seconds: float) -> dict[str, float]:
            return {"vision tokens/s": vision_tokens[side] / seconds, **(shares if side == ONE_THREAD else {})}

        sides = {side: sides[side] for side in vision_tokens}
        case = f"{count:,} samples"
        rows = measure_case(case, sides, settings.rounds, count, "samples", figures=figures, warm=False)
        if settings.long:
            rows.append(_memory_row(folder, files, settings.pick(20, 2000, 2000)))
    return Table("loader", "images and videos with questions to packed rows of stage 4", rows, notes + failures)


def alternating(files: list[pathlib.Path], count: int) -> list[pathlib.Path]:
    """Returns `count` files, images and videos in turn."""
    kinds = [[path for path in files if is_video(path) is kind] for kind in (False, True)]
    turns = itertools.cycle([itertools.cycle(paths) for paths in kinds if paths])
    return [next(next(turns)) for _ in range(count)]


def open_dataset(folder: pathlib.Path, files: list[pathlib.Path]) -> MixtureDataset:
    """Writes and indexes a data set that asks a question about each file."""
    path = folder / f"{len(files)}.jsonl"
    with path.open("w") as file:
        for number, media in enumerate(files):
            question = {"from": "human", "value": f"What is shown in part {number}?"}
            record = {"video" if is_video(media) else "image": [str(media.resolve())]}
            record["conversations"] = [question, {"from": "gpt", "value": _ANSWER}]
            file.write(json.dumps(record) + "\n")
    builder = SampleBuilder(TOKENIZER, data_settings(mixture(image_merge=2)))
    return open_mixture([DatasetSpec("media", (str(path),), outside=True)], builder, build=True)


def read_with_loader(dataset: MixtureDataset) -> int:
    """Reads an epoch as training does and returns the number of vision tokens."""
    with Loader(dataset, 1) as batches:
        return sum(_vision_tokens(batch.arrays) for batch in batches)


def read_in_one_thread(dataset: MixtureDataset, shares: dict[str, float]) -> int:
    """Reads an epoch, stores the share of CPU time of each kind of work and returns the number of vision tokens."""
    step_plan = dataset.step_plan(1)
    build_batch = BatchBuilder(dataset, step_plan, [0])
    start = time.process_time()
    with _timed_parts() as cpu_times:
        vision_tokens = sum(_vision_tokens(build_batch(step)) for step in range(len(step_plan)))
    total = time.process_time() - start
    cpu_times["rest"] = total - sum(cpu_times.values())
    shares |= {f"{name} %": 100 * seconds / total for name, seconds in cpu_times.items()}
    return vision_tokens


@contextlib.contextmanager
def _timed_parts() -> Iterator[collections.Counter[str]]:
    """Context in which the CPU time of each kind of work is accumulated, in seconds by name."""
    cpu_times: collections.Counter[str] = collections.Counter()

    def timed(function, name: str):
        def run(*args, **kwargs):
            start = time.thread_time()
            result = function(*args, **kwargs)
            cpu_times[name] += time.thread_time() - start
            return result

        return run

    decode_frames = processor.Processor._decode_frames

    def timed_frames(self, reader):
        return iter(timed(functools.partial(next, decode_frames(self, reader), None), "decode"), None)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(processor.Processor, "_decode_frames", timed_frames))
        for owner, attribute, name in (
            (images.ImageReader, "load", "decode"),
            (resize, "resize_image", "resize"),
            (patchify, "patchify", "patchify"),
            (pruning, "prune", "mask"),
            (chat_template, "render", "tokenise"),
            (loader, "pack", "pack"),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, timed(getattr(owner, attribute), name)))
        yield cpu_times


def _memory_row(folder: pathlib.Path, files: list[pathlib.Path], count: int) -> Row:
    """Reads many samples once; the figures are the resident memory of the process after each tenth of them."""
    dataset, sizes, seen = open_dataset(folder, alternating(files, count)), [], 0
    start = time.perf_counter()
    with Loader(dataset, 1) as batches:
        for batch in batches:
            seen += int((batch.samples >= 0).sum())
            while seen * _TENTHS >= (len(sizes) + 1) * count:
                sizes.append(process_memory("VmRSS"))
    figures = {f"MB at {100 * (tenth + 1) // _TENTHS} %": size / 1e6 for tenth, size in enumerate(sizes)}
    return Row(f"{count:,} samples", OURS, time.perf_counter() - start, count, "samples", None, figures)


def _vision_tokens(arrays: dict) -> int:
    return int((arrays["vision_slot"] >= 0).sum())
