"""Mutated images and videos of every common format: each gives a sample or is refused in one line, soon and small."""

import functools
import io
import math
import os
import random
import re
import struct
import tempfile
import zlib
from collections.abc import Mapping

import av
import numpy as np
import pytest
from PIL import Image, features

from support.bounded import run_bounded
from support.media import TOKENIZER, numbered_frame
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.tokenizer import Tokenizer

HEIGHT, WIDTH = 64, 96
IMAGES = ("png", "jpg", "gif", "webp", "tiff", "bmp", *(["avif"] if features.check("avif") else []))
VIDEOS = {"mp4": "h264", "mkv": "h264", "webm": "libvpx-vp9", "avi": "mpeg4", "mov": "mpeg4", "ts": "h264"}
VIDEOS |= {"flv": "flv"}
FORMATS = (*IMAGES, *VIDEOS)
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**62, 2**64 - 1)


def encode_image(extension: str) -> bytes:
    """Returns an image with noise, EXIF orientation and, where the format has them, several frames."""
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(numbered_frame(number, HEIGHT, WIDTH)) for number in range(6)]
    for frame in frames:
        frame.paste(Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)), (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {
        "gif": {"save_all": True, "append_images": frames[1:], "duration": 300, "loop": 0},
        "webp": {"save_all": True, "append_images": frames[1:], "duration": 300},
        "png": {"exif": exif},
        "jpg": {"exif": exif},
        "tiff": {"compression": "tiff_lzw"},
    }
    file = io.BytesIO()
    frames[0].save(file, Image.registered_extensions()[f".{extension}"], **options.get(extension, {}))
    return file.getvalue()


def encode_video(extension: str) -> bytes:
    """Returns three seconds of numbered frames, 25 a second."""
    file = io.BytesIO()
    with av.open(file, "w", format={"mkv": "matroska", "ts": "mpegts"}.get(extension, extension)) as container:
        stream = container.add_stream(VIDEOS[extension], rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(75):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(number, HEIGHT, WIDTH))))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.fixture(scope="module")
def originals() -> dict[str, bytes]:
    """One small file of each format."""
    images = {extension: encode_image(extension) for extension in IMAGES}
    return images | {extension: encode_video(extension) for extension in VIDEOS}


def mutated(originals: Mapping[str, bytes], seed: int) -> tuple[str, bytes]:
    """Returns the extension and the content of a file with one to four mutations."""
    rng = random.Random(seed)
    extension = FORMATS[seed % len(FORMATS)]
    data = bytearray(originals[extension])
    for _ in range(rng.choice((1, 1, 2, 4))):
        mutate(data, originals, rng)
    return extension, with_checksums(bytes(data)) if extension == "png" and rng.random() < 0.7 else bytes(data)


def mutate(data: bytearray, originals: Mapping[str, bytes], rng: random.Random) -> None:
    """Changes a random place: anywhere, in the header, or in the fields behind a four-letter name such as "stts"."""
    names = [match.end() for match in re.finditer(rb"[A-Za-z]{4}", data)]
    places = [rng.randrange(len(data) + 1), rng.randrange(min(len(data), 600) + 1)]
    at = rng.choice([*places, rng.choice(names) + rng.randrange(32)] if names else places)
    size = int(2 ** rng.uniform(0, 9))
    match rng.choice(("bits", "bits", "integer", "integer", "integer", "cut", "remove", "repeat", "insert", "splice")):
        case "bits":
            for place in [at, *(at + rng.randrange(size) for _ in range(rng.choice((0, 0, 3, size))))]:
                if place < len(data):
                    data[place] ^= 1 << rng.randrange(8)
        case "integer":
            width = rng.choice((1, 2, 4, 4, 8))
            value = rng.choice((*EXTREMES, rng.getrandbits(64), rng.getrandbits(16))) % 256**width
            data[at : at + width] = value.to_bytes(width, rng.choice(("big", "little")))
        case "cut":
            del data[at:]
        case "remove":
            del data[at : at + size]
        case "repeat":
            data[at:at] = data[at : at + size] * rng.choice((1, 1, 50))
        case "insert":
            data[at:at] = rng.choice((rng.randbytes(size), bytes(size)))
        case "splice":
            other = originals[rng.choice(FORMATS)]
            begin = rng.randrange(len(other))
            data[at : at + size] = other[begin : begin + size * 8]


def with_checksums(png: bytes) -> bytes:
    """Corrects the checksums of a PNG's chunks, without which nearly every mutation would be refused as such."""
    out, at = bytearray(png[:8]), 8
    while at + 12 <= len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        if at + 12 + size > len(png):
            break
        chunk = png[at + 4 : at + 8 + size]
        out += png[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        at += 12 + size
    return bytes(out) + png[at:]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TOKENIZER)


def read(originals: Mapping[str, bytes], seed: int) -> tuple[int, int]:
    """Makes a sample of a mutated file, opened in one of the ways in which it can be."""
    extension, data = mutated(originals, seed)
    rng = random.Random(-seed)
    kind = rng.choice(("image", "image", "video")) if extension in IMAGES else rng.choice(("video",) * 9 + ("image",))
    options = rng.choice(({}, {}, {"fps": 2}, {"fps": 0.4}, {"start": 1}, {"start": 0.5, "end": 2.2}, {"end": 0.3}))
    preprocess = rng.choice(("official", "official", "native"))
    return sample(data, extension, kind, options if kind == "video" else {}, preprocess, as_bytes=rng.random() < 0.3)


def sample(
    data: bytes, extension: str, kind: str, options: Mapping[str, float], preprocess: str, as_bytes: bool
) -> tuple[int, int]:
    """Makes a sample of a file, as `vl3 ask` would; returns its numbers of frames and of vision tokens."""
    processor = Processor(tokenizer(), ProcessorConfig(preprocess=preprocess, max_tokens=600))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"file.{extension}")
        with open(path, "wb") as file:
            file.write(data)
        part = {"type": kind, kind: data if as_bytes else path, **options}
        output = processor([{"role": "user", "content": [part, "What is it?"]}])
    for video in output.videos:
        times = video.timestamps or []
        assert all(map(math.isfinite, times)), times
        assert times == sorted(times), times
    return sum(visual.grid[0] for visual in output.sample.visuals), output.visual_tokens


@pytest.mark.parametrize("extension", FORMATS)
def test_the_originals_are_readable(originals, extension):
    frames, tokens = sample(
        originals[extension], extension, "image" if extension in IMAGES else "video", {}, "official", as_bytes=False
    )
    assert frames == (1 if extension in IMAGES else 3)
    assert tokens >= 16


@pytest.mark.parametrize("seeds", [range(100), pytest.param(range(100, 2100), marks=pytest.mark.slow)], ids=len)
def test_a_sample_or_one_line(originals, tmp_path, seeds):
    outcomes = run_bounded(functools.partial(read, originals), seeds, prepare=tokenizer)
    harmful = [outcome for outcome in outcomes if not outcome.harmless]
    for outcome in harmful:
        extension, data = mutated(originals, outcome.item)
        (tmp_path / f"{outcome.item}.{extension}").write_bytes(data)
    assert not harmful, f"{len(harmful)} of {len(seeds)}; the files are in {tmp_path}:\n" + "\n".join(map(str, harmful))
    # Mutations that are all refused, or none, would test nothing.
    share = sum(outcome.kind == "result" for outcome in outcomes) / len(outcomes)
    assert 0.2 < share < 0.8
