"""`vl3 track`: follows objects through a video with SAM-2."""

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vl3_jax.cli import generation_flags, segmentation_flags, settings_flags
from vl3_jax.cli.segmentation_output import SegmentationOutput
from vl3_jax.config_tree import Limits
from vl3_jax.errors import InputError
from vl3_jax.processing.object_prompts import Prompt, check_prompts
from vl3_jax.processing.video_frames import VideoFrames
from vl3_jax.processing.videos import open_video

logger = logging.getLogger(__name__)

EPILOG = """examples:
  vl3 track --model DIR --video cat.mp4 --prompt 0:cat:point=320,240,1 --out masks --overlay cat_masks.mp4
  vl3 track --model DIR --video cat.mp4 --prompt "0:1:point=320,240;10,10,0" --prompt 9:2:box=10,20,200,180 --out masks
  vl3 track --model DIR --image cat.jpg --prompt 0:cat:box=10,20,200,180 --out masks --json

prompts, in pixels of the frame; FRAME counts from 0, OBJECT is a number or a name:
  FRAME:OBJECT:point=x,y,1;x,y,0      points on the object (1) and beside it (0)
  FRAME:OBJECT:box=x0,y0,x1,y1        a box around it, alone or beside points
  FRAME:OBJECT:mask=FILE              its mask, a picture of the frame's size
  FRAME:OBJECT:correction=x,y,0;...   points that correct what is tracked in this frame from the others

Masks go to DIR/OBJECT/FRAME.png frame by frame: stopped with Ctrl-C, those that are there stay. The video may be of any
length. With --json, `masks` are run lengths by object and frame, with the predicted IoU (`score`) and the logit of the
object being there (`object_score`).

exit codes: 0 done, 2 bad input (one line on stderr names it), 1 a failure of ours or of stdout"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    segmentation_flags.add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--video", metavar="F", help="a video, an animation or a folder of frames; - is stdin")
    source.add_argument("--image", metavar="F", help="an image, which is frame 0")
    segmentation_flags.add_prompts(parser)
    parser.add_argument(
        "--start-frame",
        type=settings_flags.number(int, Limits(0, 2**31 - 1)),
        metavar="N",
        help="frame to begin with (default: the first one, or with --reverse the last one)",
    )
    parser.add_argument("--reverse", action="store_true", help="track backwards, to the first frame")
    segmentation_flags.add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    """Tracks the objects, and writes their masks as the frames come."""
    frames = open_frames(arguments)
    start, reverse = arguments.start_frame, arguments.reverse
    if start is None:
        start = len(frames) - 1 if reverse else 0
    if start >= len(frames):
        raise InputError(f"--start-frame is {start}, and the video has {len(frames)} frames, counted from 0")
    order = range(start, -1, -1) if reverse else range(start, len(frames))
    prompts = _checked(segmentation_flags.joined(arguments.prompts), frames, order)
    output = SegmentationOutput(arguments, frames)  # before the model is loaded

    from vl3_jax.inference.segmenter import load_segmenter

    began = time.perf_counter()
    quiet = not sys.stderr.isatty()
    model = load_segmenter(arguments.model, dtype=arguments.dtype, token=arguments.token, quiet=quiet)
    loaded = time.perf_counter()
    with output:
        tracked = model.track(frames, prompts, start=start, reverse=reverse)
        for frame in _with_progress(tracked, len(order)):
            output.add(frame)
        for warning in frames.reader.warnings:
            logger.warning("vl3 track: warning: %s", warning)
        output.report({"load": loaded - began, "track": time.perf_counter() - loaded})


def open_frames(arguments: argparse.Namespace) -> VideoFrames:
    """Opens the frames of --video, or the one of --image."""
    if arguments.video is not None:
        return VideoFrames(open_video(generation_flags.file_argument(arguments.video)))
    return VideoFrames(open_video([generation_flags.file_argument(arguments.image)]))


def _checked(prompts: list[Prompt], frames: VideoFrames, order: Sequence[int]) -> list[Prompt]:
    """Returns the prompts with their masks read, each checked with its frame: not all need be of one size."""
    check_prompts(prompts, len(frames), order)
    return [prompt.checked(frames[prompt.frame].height, frames[prompt.frame].width) for prompt in prompts]


def _with_progress(frames: Iterable[Any], total: int) -> Iterator[Any]:
    """Shows progress on stderr from the first frame on."""
    from tqdm import tqdm

    frames = iter(frames)
    first = next(frames)  # bad input is one line, without a bar
    with tqdm(total=total, unit=" frames", file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 10.0) as bar:
        for frame in itertools.chain([first], frames):
            yield frame
            bar.update()
