"""Small data sets on disk: images and videos of a few patches, records of every kind, and known bad records."""

import io
import json
import pathlib
import tarfile
from collections.abc import Iterable

import numpy as np
from PIL import Image

from data_pipelines.mixture_dataset import DatasetSpec, MixtureDataset, open_mixture
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.settings import DataSettings
from support.media import TOKENIZER as TOKENIZER
from support.media import write_video
from vl3_jax.processing.packed_batch import BatchShape, Sample
from vl3_jax.processing.processor_config import ProcessorConfig

SETTINGS = DataSettings(
    BatchShape(length=512, patches=1024, vision_tokens=512, samples=8),
    ProcessorConfig(max_tokens=128, min_tokens=4, image_merge=2, threads=1, max_frames=6),
    max_frame_patches=256,
)


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_media(folder: pathlib.Path, images: int = 4, videos: int = 3) -> None:
    """Writes p0.png, ... of noise; v0.mp4, ... of numbered frames, 2, 3, ... s long; `still`, a folder of frames."""
    rng = np.random.default_rng(0)
    for number in range(images):
        height, width = rng.integers(20, 300, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"p{number}.png")
    for number in range(videos):
        write_video(folder / f"v{number}.mp4", range(0, 1000 * (number + 2), 200))
    (folder / "still").mkdir()
    frame = rng.integers(0, 256, (84, 112, 3), np.uint8)
    for number in range(9):
        frame[:28, :28] = 20 * number
        Image.fromarray(frame).save(folder / "still" / f"{number}.png")


def good_records(count: int, images: int = 4, videos: int = 3, seed: int = 0) -> list[dict]:
    """Returns records of text, images, videos, both, and streams in turn; the text of each contains its number."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        conversation = turns(f"Question {number}?", f"Answer {number} " + "word " * int(rng.integers(1, 30)))
        image, video = f"p{rng.integers(images)}.png", f"v{rng.integers(videos)}.mp4"
        kind = number % 5
        if kind == 1:
            records.append({"image": [image], "conversations": conversation})
        elif kind == 2:
            records.append({"video": [video], "conversations": conversation})
        elif kind == 3:
            records.append({"image": [image, "p0.png"], "video": video, "conversations": conversation})
        elif kind == 4:
            stream = [
                {"role": "user", "content": f"Tell {number}.", "time": 0.0},
                {"role": "assistant", "content": "It began.", "time": 0.5},
                {"role": "assistant", "content": "It goes on.", "time": 1.5},
            ]
            records.append({"video": [video], "stream": True, "start_time": 0.0, "conversation": stream})
        else:
            records.append({"conversations": conversation})
    return records


def write_lines(path: pathlib.Path, records: list) -> str:
    """Writes JSON lines and returns the path; records that are bytes are written unchanged."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def write_tar(path: pathlib.Path, members: Iterable[tuple[str, bytes]]) -> str:
    """Writes a tar with members (name, content) and returns its path."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def bad_records(folder: pathlib.Path) -> list:
    """Writes damaged media and returns one bad record of each kind that training must survive."""
    (folder / "empty.png").write_bytes(b"")
    (folder / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    image = (folder / "p0.png").read_bytes()
    (folder / "cut.png").write_bytes(image[: len(image) // 2])
    video = (folder / "v2.mp4").read_bytes()
    (folder / "noise.mp4").write_bytes(video[: len(video) // 3])
    return [
        b'{"conversations": [',
        b'{"caf\xe9": 1}',
        {"conversations": []},
        {"image": ["gone.png"], "conversations": turns("Q", "A")},
        {"image": ["empty.png"], "conversations": turns("Q", "A")},
        {"image": ["noise.png"], "conversations": turns("Q", "A")},
        {"image": ["cut.png"], "conversations": turns("Q", "A")},
        {"video": ["noise.mp4"], "conversations": turns("Q", "A")},
        {"video": ["gone.mp4"], "conversations": turns("Q", "A")},
        {"image": ["p0.png"], "conversations": turns("<image> <image>", "A")},
    ]


def make_mixture(
    folder: pathlib.Path, records: dict[str, list], settings: DataSettings = SETTINGS, **weights
) -> MixtureDataset:
    """Writes annotation files `<name>.jsonl` into a folder with media and opens them as a mixture."""
    specs = [
        DatasetSpec(name, (write_lines(folder / f"{name}.jsonl", rows),), str(folder), name[:1], weights.get(name, 1.0))
        for name, rows in records.items()
    ]
    return open_mixture(specs, SampleBuilder(TOKENIZER, settings), build=True)


def unpacked(batch: dict[str, np.ndarray], row: int, segment: int) -> dict[str, np.ndarray]:
    """Extracts a segment (from 1) of a packed row: ids, weights, placeholders, patches of its vision tokens."""
    members = batch["segment_ids"][row] == segment
    slots = batch["vision_slot"][row][members]
    token_patches = batch["token_patches"][row][slots[slots >= 0]]
    patches = batch["patches"][row].reshape(-1, 588)
    vision_row = np.arange(batch["patch_segment"].shape[1])[:, None]
    frames = (batch["patch_segment"][row] + 10_000 * vision_row).reshape(-1)
    weight = np.roll(batch["loss_weight"][row][members], 1)
    return {
        "tokens": batch["tokens"][row][members],
        "targets": batch["targets"][row][members][:-1],
        "positions": batch["positions"][row][members],
        "weight": weight,
        "is_vision": slots >= 0,
        "patches": np.concatenate([patches[n[n >= 0]] for n in token_patches]) if len(token_patches) else patches[:0],
        "frames": frames[token_patches[:, 0]],
    }


def expected(sample: Sample) -> dict[str, np.ndarray]:
    """Returns the same arrays from the sample itself; `frames` only distinguishes tokens of different frames."""
    kept = [
        visual.patches.reshape(len(visual.keep), -1, 588)[visual.keep].reshape(-1, 588) for visual in sample.visuals
    ]
    frames = [
        np.repeat(np.arange(visual.grid[0]), visual.tokens_per_frame)[visual.keep] + 1000 * n
        for n, visual in enumerate(sample.visuals)
    ]
    weight = sample.loss_weight.copy()
    weight[:1] = 0
    return {
        "tokens": sample.tokens,
        "targets": sample.tokens[1:],
        "positions": np.arange(len(sample.tokens)),
        "weight": weight,
        "is_vision": sample.is_vision,
        "patches": np.concatenate([*kept, np.empty((0, 588), np.uint8)]),
        "frames": np.concatenate([*frames, np.empty(0, int)]),
    }


def assert_holds(batch: dict[str, np.ndarray], row: int, segment: int, sample: Sample) -> None:
    """Asserts that the segment reproduces the sample exactly."""
    actual, wanted = unpacked(batch, row, segment), expected(sample)
    for arrays in (actual, wanted):  # renumber the frames in order of appearance
        order = {frame: number for number, frame in enumerate(dict.fromkeys(arrays["frames"].tolist()))}
        arrays["frames"] = [order[frame] for frame in arrays["frames"].tolist()]
    for name, value in wanted.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
