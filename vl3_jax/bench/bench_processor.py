"""Images and videos to patches and pruning mask, against a plain loop and against transformers' processors.

All sides sample one frame a second, resize within the same budget, cut patches and compute the mask; ours also renders
the prompt. The plain loop decodes every frame and resizes one after the other.
"""

import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.bench.inputs import GREY, build_reference
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, REFERENCE, Row, Table
from vl3_jax.bench.timing import measure_case, run_python
from vl3_jax.errors import InputError
from vl3_jax.processing.diff_pruning import keep_mask
from vl3_jax.processing.patchify import normalise, patchify
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.resize import PATCH, ResizeItem, target_sizes
from vl3_jax.processing.tokenizer import Tokenizer

PLAIN, OFFICIAL = "plain loop", "official preprocessing"
CONFIG = ProcessorConfig(preprocess="native")
MEMORY_LIMIT = 600e6  # target for an hour of video, in bytes above that of one image
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FAST_H264 = {"preset": "veryfast", "crf": "28", "g": "250"}
# Processes a file in a process of its own, to measure its memory.
_PROCESS = (
    "import sys; from vl3_jax.bench import bench_processor as b; b.count_frames(b.processor('official'), sys.argv[1])"
)


def measure(settings: Settings) -> Table:
    """Measures a synthetic video and a synthetic image, or given files."""
    theirs, notes = build_reference(lambda module: module.media_processing(CONFIG))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case, path in media_files(settings, pathlib.Path(folder)).items():
            sides = {
                OURS: functools.partial(count_frames, processor("native"), path),
                PLAIN: functools.partial(plain_processing, path),
            }
            if settings.media:
                sides[OFFICIAL] = functools.partial(count_frames, processor("official"), path)
            if theirs is not None:
                sides[REFERENCE] = lambda path=path: theirs(path, is_video(path))[0]
            frames, failures = first_results(case, sides)
            notes += failures
            if OURS in frames:
                sides = {side: sides[side] for side in frames}
                rows += measure_case(case, sides, settings.rounds, frames, "frames", warm=False)
        if settings.long:
            rows.append(_hour(settings, pathlib.Path(folder)))
    return Table("processor", "media to patches and pruning mask", rows, notes)


def media_files(settings: Settings, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the media of the settings, or a synthetic video and image that are written to `folder`, by case."""
    if settings.media:
        return {path.name: path for path in settings.media}
    size, seconds = settings.pick((96, 64), (640, 360), (640, 360)), settings.pick(4, 60, 60)
    video, image = folder / "synthetic.mp4", folder / "synthetic.png"
    write_video(video, size, seconds)
    Image.fromarray(synthetic_frame(0, size)).save(image)
    return {f"video of {seconds} s, {size[0]} x {size[1]}": video, f"image of {size[0]} x {size[1]}": image}


def first_results(case: str, sides: Mapping[str, Callable[[], int]]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Runs each side once.

    Returns:
      The results of the sides that can read the media, and notes on the others.
    """
    results, notes = {}, ()
    for side, run in sides.items():
        try:
            results[side] = run()
        except Exception as error:
            if side not in (PLAIN, REFERENCE) and not isinstance(error, InputError):
                raise
            notes += (f"{side} cannot read {case}: {' '.join(str(error).split())[:120]}",)
    return results, notes


def synthetic_frame(index: int, size: tuple[int, int]) -> np.ndarray:
    """Generates a frame with a bright square that moves over a still background.

    Args:
      index: Number of the frame.
      size: (width, height) in pixels.

    Returns:
      [height, width, 3] uint8.
    """
    width, height = size
    frame = np.add.outer(np.arange(height), np.arange(width))[..., None] // (2, 3, 5) % 200
    left = 2 * index % (width - height // 4)
    frame[height // 4 : height // 2, left : left + height // 4] = 255
    return frame.astype(np.uint8)


def write_video(
    path: pathlib.Path, size: tuple[int, int], seconds: int, rate: int = 10, codec: str = "mpeg4", options: Mapping = {}
) -> None:
    """Encodes a video of synthetic frames; `size` is (width, height), `options` are those of the codec."""
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=dict(options))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(seconds * rate):
            frame = av.VideoFrame.from_ndarray(synthetic_frame(index, size))
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def repeat_video(once: pathlib.Path, path: pathlib.Path, repeats: int) -> None:
    """Writes a video in which the packets of a video are repeated."""
    playlist = once.with_suffix(".txt")
    playlist.write_text(f"file '{once.name}'\n" * repeats)
    with av.open(os.fspath(playlist), format="concat") as source, av.open(os.fspath(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:  # the last one only flushes the decoder
                packet.stream = stream
                target.mux(packet)


def _hour(settings: Settings, folder: pathlib.Path) -> Row:
    """Measures the time and the memory of the processing of an hour of video, in addition to those of an image."""
    size, seconds, repeats = settings.pick((96, 64), (1280, 720), (1280, 720)), 20, settings.pick(3, 180, 180)
    image, once, hour = (folder / name for name in ("image.png", "once.mp4", "hour.mp4"))
    Image.fromarray(synthetic_frame(0, size)).save(image)
    write_video(once, size, seconds, 25, "libx264", _FAST_H264)
    repeat_video(once, hour, repeats)
    idle, busy = (run_python("-c", _PROCESS, os.fspath(path)) for path in (image, hour))
    figures = {"peak MB": (busy.peak_bytes - idle.peak_bytes) / 1e6, "target MB": MEMORY_LIMIT / 1e6}
    frames = count_frames(processor("official"), hour)
    case = f"video of {seconds * repeats:,} s, {size[0]} x {size[1]}"
    return Row(case, OURS, max(busy.seconds - idle.seconds, 1e-3), frames, "frames", None, figures)


@functools.cache
def processor(preprocess: str) -> Processor:
    """Returns a processor in one of the modes of preprocessing."""
    return Processor(Tokenizer.from_folder(TOKENIZER), ProcessorConfig(preprocess=preprocess))


def is_video(path: pathlib.Path) -> bool:
    """Whether a file is a video, by its ending."""
    return path.suffix.lower() not in _IMAGE_SUFFIXES


def count_frames(processor: Processor, path: str | os.PathLike) -> int:
    """Processes an image or a video with a question and returns the number of frames that the model receives."""
    kind = "video" if is_video(pathlib.Path(path)) else "image"
    processed = processor([{"role": "user", "content": [{"type": kind, kind: os.fspath(path)}, "What happens?"]}])
    return processed.sample.visuals[0].grid[0]


def plain_processing(path: pathlib.Path) -> int:
    """Processes an image or a video frame by frame and returns the number of frames."""
    if not is_video(path):
        frames, merge = [np.asarray(Image.open(path).convert("RGB"))], CONFIG.image_merge
    else:
        with av.open(os.fspath(path)) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            rate = float(container.streams.video[0].average_rate)
        frames, merge = decoded[:: round(rate / CONFIG.fps)][: CONFIG.max_frames], CONFIG.video_merge
    item = ResizeItem(*frames[0].shape[:2], merge, len(frames))
    ((height, width),) = target_sizes([item], CONFIG.preprocess, CONFIG.min_tokens, CONFIG.max_tokens)
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    patches = [patchify(np.asarray(frame)[None], merge) for frame in resized]
    keep_mask(normalise(np.stack(patches), GREY, GREY).reshape(len(frames), -1, merge**2 * 3 * PATCH**2))
    return len(frames)
