"""Images and videos to patches and pruning mask, against a plain loop and against transformers' processors.

All sides sample one frame a second, resize within the same budget, cut patches and compute the mask; ours also renders
the prompt. The plain loop decodes every frame and resizes one after the other.
"""

import functools
import os
import pathlib
import tempfile
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.bench import reference
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.bench.timing import in_turns
from vl3_jax.processing.diff_pruning import keep_mask
from vl3_jax.processing.patchify import patchify
from vl3_jax.processing.processor import Processor, ProcessorOutput
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.resize import MAX_TOKENS, MIN_TOKENS, PATCH, ResizeItem, target_sizes
from vl3_jax.processing.tokenizer import Tokenizer

PLAIN = "plain loop"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FPS, _MAX_FRAMES, _MIN_FRAMES = 1, 180, 4
_VIDEO_FPS = 10  # frame rate of the synthetic video


def measure(settings: Settings) -> Table:
    """Measures a synthetic video and a synthetic image."""
    size = settings.pick((96, 64), (640, 360), (640, 360))
    seconds = settings.pick(4, 60, 60)
    processor = Processor(Tokenizer.from_folder(TOKENIZER), ProcessorConfig(preprocess="native"))
    theirs, missing = reference_processing()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        video, image = pathlib.Path(folder) / "synthetic.mp4", pathlib.Path(folder) / "synthetic.png"
        write_video(video, size, seconds)
        Image.fromarray(synthetic_frame(0, size)).save(image)
        cases = (
            (f"video of {seconds} s, {size[0]} x {size[1]}", video),
            (f"image of {size[0]} x {size[1]}", image),
        )
        for case, path in cases:
            sides = {
                OURS: functools.partial(count_frames, processor, path),
                PLAIN: functools.partial(plain_processing, path),
            }
            if theirs is not None:
                sides[reference.SIDE] = functools.partial(theirs, path)
            frames = {side: run() for side, run in sides.items()}
            times = in_turns(sides, settings.rounds, warm=False)
            rows += [Row(case, side, time, frames[side], "frames") for side, time in times.items()]
    return Table("processor", "media to patches and pruning mask", rows, (missing,) if missing else ())


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


def write_video(path: pathlib.Path, size: tuple[int, int], seconds: int) -> None:
    """Encodes a video of synthetic frames; `size` is (width, height)."""
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=_VIDEO_FPS)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(seconds * _VIDEO_FPS):
            frame = av.VideoFrame.from_ndarray(synthetic_frame(index, size))
            frame.pts, frame.time_base = index, Fraction(1, _VIDEO_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def process(processor: Processor, path: pathlib.Path) -> ProcessorOutput:
    """Processes an image or a video with a question."""
    kind = "image" if path.suffix in IMAGE_SUFFIXES else "video"
    return processor([{"role": "user", "content": [{"type": kind, kind: str(path)}, "What happens?"]}])


def count_frames(processor: Processor, path: pathlib.Path) -> int:
    """Processes an image or a video with a question and returns the number of frames that the model receives."""
    return process(processor, path).sample.visuals[0].grid[0]


def plain_processing(path: pathlib.Path) -> int:
    """Processes an image or a video frame by frame and returns the number of frames."""
    if path.suffix in IMAGE_SUFFIXES:
        frames, merge = [np.asarray(Image.open(path).convert("RGB"))], 1
    else:
        with av.open(os.fspath(path)) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            rate = float(container.streams.video[0].average_rate)
        frames, merge = decoded[:: round(rate / _FPS)][:_MAX_FRAMES], 2
    item = ResizeItem(*frames[0].shape[:2], merge, len(frames))
    ((height, width),) = target_sizes([item], "native", MIN_TOKENS, MAX_TOKENS)
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    patches = [patchify(np.asarray(frame)[None], merge) for frame in resized]
    keep_mask(reference.normalise(np.stack(patches)).reshape(len(frames), -1, merge**2 * 3 * PATCH**2))
    return len(frames)


def reference_processing() -> tuple[Callable[[pathlib.Path], int] | None, str | None]:
    """Builds transformers' processing of one file.

    Returns:
      A function that processes a file and returns the number of frames, and None; or None and why it is missing.
    """
    if missing := reference.why_missing():
        return None, missing
    try:
        from transformers.models.video_llama_3.image_processing_video_llama_3 import VideoLlama3ImageProcessor
        from transformers.models.video_llama_3.video_processing_video_llama_3 import VideoLlama3VideoProcessor
        from transformers.video_utils import load_video
    except ImportError as error:
        return None, f"without {reference.SIDE}: {' '.join(str(error).split())[:120]}"
    normalisation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    image_processor = VideoLlama3ImageProcessor(size=_budget(PATCH), **normalisation)
    limits = {"max_frames": _MAX_FRAMES, "min_frames": _MIN_FRAMES, "use_token_compression": True}
    video_processor = VideoLlama3VideoProcessor(size=_budget(2 * PATCH), **limits, **normalisation)

    def run(path: pathlib.Path) -> int:
        if path.suffix in IMAGE_SUFFIXES:
            return len(image_processor(Image.open(path).convert("RGB"), return_tensors="pt")["image_grid_thw"])
        sample_indices = functools.partial(video_processor.sample_frames, fps=_FPS)
        frames, metadata = load_video(str(path), backend="pyav", sample_indices_fn=sample_indices)
        result = video_processor([frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
        return int(result["video_grid_thw"][0, 0])

    return run, None


def _budget(factor: int) -> dict[str, int]:
    """Returns the limits on the pixels of an image, or of all frames of a video."""
    return {"shortest_edge": MIN_TOKENS * factor**2, "longest_edge": MAX_TOKENS * factor**2}
