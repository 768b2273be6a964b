"""`vl3 segment`: masks of what a text names, or of a point, box or mask; and what a region shows, in words."""

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from vl3_jax.cli import generation_flags, segmentation_flags
from vl3_jax.cli.segmentation_output import SegmentationOutput
from vl3_jax.cli.track import open_frames
from vl3_jax.errors import InputError
from vl3_jax.processing.mask_files import check_object_name
from vl3_jax.processing.object_prompts import Prompt

logger = logging.getLogger(__name__)

EPILOG = """examples:
  vl3 segment --model DIR --image street.jpg "the red car" --out masks --overlay street_masks.png
  vl3 segment --model DIR --video cat.mp4 "Who jumps?" --key-frames 5 --mode sa2va_i --out masks --overlay out.mp4
  vl3 segment --model DIR --image street.jpg --box 10,20,200,180 --describe --out masks
  vl3 segment --model DIR --image street.jpg "the red car" --describe "What is behind region1?" --out masks --json

A phrase enters the template that the model was trained on, a question asks for a mask too, and a request, which begins
like an order or speaks of masks, is sent as it is. Masks go to DIR/OBJECT/FRAME.png; an answer without objects has
none. Where the answer says which words an object goes with, they are its name, otherwise its number.

exit codes: 0 done, 2 bad input (one line on stderr names it), 1 a failure of ours or of stdout"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    generation_flags.add_checkpoint(
        parser.add_argument_group("model"), "a Sa2VA (`vl3 convert init --base ... --sam2 ...`)", "float32 on a CPU"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--image", metavar="F", help="an image")
    source.add_argument("--video", metavar="F", help="a video, an animation or a folder of frames; - is stdin")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what is to be drawn")
    for kind, metavar, text in (
        ("points", "x,y,1;x,y,0", "points on the object (1) and beside it (0), in the first frame"),
        ("box", "x0,y0,x1,y1", "a box around it"),
        ("mask", "FILE", "its mask, a picture of the frame's size"),
    ):
        parser.add_argument(f"--{kind}", metavar=metavar, help=text)
    parser.add_argument(
        "--describe",
        nargs="?",
        const="",
        metavar="QUESTION",
        help="say what the regions of an image show, or answer a question that calls them region1, region2, ...",
    )
    generation_flags.add_tracking(parser)
    group = parser.add_argument_group("answer")
    generation_flags.add_sampling(group, ["max_new_tokens"])
    generation_flags.add_visual_limit(group)
    segmentation_flags.add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    """Draws the objects, and writes their masks as the frames come."""
    region = _region(arguments)
    if (arguments.text is None) == (region is None):
        raise InputError("give a text, or one object by --points, --box or --mask, and not both")
    if arguments.describe is not None and arguments.image is None:
        raise InputError("--describe is about regions of an --image; leave it out for a video")
    frames = open_frames(arguments)
    if region is not None:
        region = region.checked(frames[0].height, frames[0].width)
    settings = {name: getattr(arguments, name) for name in ("max_new_tokens", "max_visual_tokens")}
    output = SegmentationOutput(arguments, frames)  # before the model is loaded

    from vl3_jax.inference.grounded_model import GroundedModel
    from vl3_jax.inference.open_model import load

    began = time.perf_counter()
    model = load(arguments.model, dtype=arguments.dtype, token=arguments.token, quiet=not sys.stderr.isatty())
    if not isinstance(model, GroundedModel):
        model.segment()  # says what is missing
    loaded, masks, said = time.perf_counter(), [], {}
    with output:
        for frame in _drawn(model, arguments, frames, region, settings, said):
            output.add(frame)
            if arguments.describe is not None:
                masks += [mask for mask in frame.masks if mask.any()]
        if arguments.describe is not None and masks:
            question = {"question": arguments.describe} if arguments.describe else {}
            said["description"] = model.describe(frames[0], masks, **question, **settings)
        for warning in frames.reader.warnings:
            logger.warning("vl3 segment: warning: %s", warning)
        output.report({"load": loaded - began, "segment": time.perf_counter() - loaded}, said)


def _region(arguments: argparse.Namespace) -> Prompt | None:
    """Returns the object that flags point at, or None."""
    kinds = {"points": "point", "box": "box", "mask": "mask"}
    given = [f"{word}={getattr(arguments, flag)}" for flag, word in kinds.items() if getattr(arguments, flag)]
    if not given:
        return None
    try:
        (joined,) = segmentation_flags.joined(segmentation_flags.prompt(f"0:1:{shape}") for shape in given)
    except argparse.ArgumentTypeError as error:
        raise InputError(str(error)) from None
    return joined


def _drawn(
    model: Any, arguments: argparse.Namespace, frames: Any, region: Prompt | None, settings: dict, said: dict[str, str]
) -> Iterator[Any]:
    """Yields the objects of each frame under their names, and notes the answer in `said`."""
    if region is not None:
        yield from model.drawer.stock.track(frames, [region])
        return
    source = {"image": frames[0]} if arguments.image is not None else {"video": frames}
    tracking = {"key_frames": arguments.key_frames, "mode": arguments.mode or "sa2va"}
    result = model.segment(arguments.text, **source, **tracking, **settings)
    said["text"] = result.grounded.text
    names = tuple(_folder_name(name, number) for number, name in enumerate(result.names, start=1))
    for frame in result.frames():
        yield dataclasses.replace(frame, objects=names)


def _folder_name(name: str, number: int) -> str:
    """Returns the name of an object, or its number where no folder can have the name."""
    try:
        check_object_name(name)
    except InputError:
        return str(number)
    return name
