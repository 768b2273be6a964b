"""Pictures and videos to patches and pruning mask: frames a second, beside the plain way and transformers' processors.

All sides sample one frame a second, resize within the same budget, cut patches and compute the mask; ours also renders
the prompt. The plain way decodes every frame and resizes one after the other.
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
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FPS, _MAX_FRAMES, _MIN_FRAMES = 1, 180, 4
_RATE = 10  # of the drawn video


def measure(settings: Settings) -> Table:
    """A drawn video and a drawn picture."""
    size = settings.pick((96, 64), (640, 360), (640, 360))
    seconds = settings.pick(4, 60, 60)
    ours = functools.partial(shown, Processor(Tokenizer.from_folder(TOKENIZER), ProcessorConfig(preprocess="native")))
    theirs, missing = port()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        video, picture = pathlib.Path(folder) / "drawn.mp4", pathlib.Path(folder) / "drawn.png"
        draw_video(video, size, seconds)
        Image.fromarray(drawn(0, size)).save(picture)
        cases = (
            (f"video of {seconds} s, {size[0]} x {size[1]}", video),
            (f"picture of {size[0]} x {size[1]}", picture),
        )
        for case, path in cases:
            runs = {OURS: functools.partial(ours, path), PLAIN: functools.partial(plain, path)}
            if theirs is not None:
                runs[reference.SIDE] = functools.partial(theirs, path)
            frames = {side: run() for side, run in runs.items()}
            times = in_turns(runs, settings.rounds, warm=False)
            rows += [Row(case, side, time, frames[side], "frames") for side, time in times.items()]
    return Table("processor", "media to patches and pruning mask", rows, (missing,) if missing else ())


def drawn(number: int, size: tuple[int, int]) -> np.ndarray:
    """[height, width, 3] uint8: a bright square, further along from frame to frame, over a still ground."""
    width, height = size
    frame = np.add.outer(np.arange(height), np.arange(width))[..., None] // (2, 3, 5) % 200
    left = 2 * number % (width - height // 4)
    frame[height // 4 : height // 2, left : left + height // 4] = 255
    return frame.astype(np.uint8)


def draw_video(path: pathlib.Path, size: tuple[int, int], seconds: int) -> None:
    """Encodes such frames."""
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=_RATE)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(seconds * _RATE):
            frame = av.VideoFrame.from_ndarray(drawn(number, size))
            frame.pts, frame.time_base = number, Fraction(1, _RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def ask(processor: Processor, path: pathlib.Path) -> ProcessorOutput:
    """Processes a picture or video and a question."""
    kind = "image" if path.suffix in PICTURES else "video"
    return processor([{"role": "user", "content": [{"type": kind, kind: str(path)}, "What happens?"]}])


def shown(processor: Processor, path: pathlib.Path) -> int:
    """The same; how many frames the model would see."""
    return ask(processor, path).sample.visuals[0].grid[0]


def plain(path: pathlib.Path) -> int:
    """The same for a file, frame by frame."""
    if path.suffix in PICTURES:
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


def port() -> tuple[Callable[[pathlib.Path], int] | None, str | None]:
    """Transformers' processing of one file, which returns the number of frames; or None and why there is none."""
    if missing := reference.why_missing():
        return None, missing
    try:
        from transformers.models.video_llama_3.image_processing_video_llama_3 import VideoLlama3ImageProcessor
        from transformers.models.video_llama_3.video_processing_video_llama_3 import VideoLlama3VideoProcessor
        from transformers.video_utils import load_video
    except ImportError as error:
        return None, f"without {reference.SIDE}: {' '.join(str(error).split())[:120]}"
    grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pictures = VideoLlama3ImageProcessor(size=_budget(PATCH), **grey)
    limits = {"max_frames": _MAX_FRAMES, "min_frames": _MIN_FRAMES, "use_token_compression": True}
    videos = VideoLlama3VideoProcessor(size=_budget(2 * PATCH), **limits, **grey)

    def run(path: pathlib.Path) -> int:
        if path.suffix in PICTURES:
            return len(pictures(Image.open(path).convert("RGB"), return_tensors="pt")["image_grid_thw"])
        choose = functools.partial(videos.sample_frames, fps=_FPS)
        frames, metadata = load_video(str(path), backend="pyav", sample_indices_fn=choose)
        result = videos([frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
        return int(result["video_grid_thw"][0, 0])

    return run, None


def _budget(factor: int) -> dict[str, int]:
    """Pixels that a picture, or all frames of a video, may have."""
    return {"shortest_edge": MIN_TOKENS * factor**2, "longest_edge": MAX_TOKENS * factor**2}
