"""The flags of commands that find objects: prompts in pixels, and where masks and pictures go."""

import argparse
import math
from collections.abc import Iterable

from vl3_jax.cli import generation_flags
from vl3_jax.errors import InputError, printable
from vl3_jax.processing.mask_files import MASK_FORMATS, check_object_name
from vl3_jax.processing.object_prompts import Prompt

KINDS = "a folder of SAM-2 (transformers' or Meta's) or its .pt file, an Orbax folder, a Hub id owner/name@rev"
_FORMS = "FRAME:OBJECT:point=x,y,1;x,y,0, FRAME:OBJECT:box=x0,y0,x1,y1, FRAME:OBJECT:mask=FILE"
_LARGEST_FRAME = 2**31 - 1


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model and the flags of its loading."""
    generation_flags.add_checkpoint(parser.add_argument_group("model"), KINDS, "as in the checkpoint")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Adds --prompt."""
    parser.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        required=True,
        type=prompt,
        metavar="FRAME:OBJECT:KIND=VALUE",
        help="where an object is; may be repeated (see below)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of what is written."""
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, metavar="DIR", help="new or empty folder for the masks")
    group.add_argument(
        "--format",
        choices=MASK_FORMATS,
        default=MASK_FORMATS[0],
        help="masks as pictures of 0 and 255, NumPy arrays of bool, or COCO's run lengths (default: %(default)s)",
    )
    group.add_argument(
        "--overlay",
        metavar="FILE",
        type=generation_flags.file_argument,
        help="new file for the picture (.png, .jpg) or the video (.mp4) with the masks in colours and names over it",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object with run lengths and scores")


def prompt(text: str) -> Prompt:
    """Parses a prompt, FRAME:OBJECT:KIND=VALUE, for argparse."""
    frame, _, rest = text.partition(":")
    obj, _, shape = rest.partition(":")
    kind, _, value = shape.partition("=")
    try:
        check_object_name(obj)
        number = _frame(frame)
        if kind in ("point", "correction"):
            points = tuple(_point(point) for point in value.split(";"))
            return Prompt(number, obj, points, correction=kind == "correction")
        if kind == "box":
            return Prompt(number, obj, box=tuple(_numbers(value, 4)))
        if kind == "mask" and value:
            return Prompt(number, obj, mask=generation_flags.file_argument(value))
        raise InputError(f"give {_FORMS}")
    except InputError as error:
        raise argparse.ArgumentTypeError(f"{printable(repr(text))}: {error}") from None


def joined(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Returns prompts with the points and the box that an object has in a frame as one.

    Raises:
      InputError: An object has two prompts of a kind in a frame, or a mask beside others.
    """
    found: dict[tuple, dict] = {}
    for one in prompts:
        shapes = {name: value for name in ("points", "box", "mask") if (value := getattr(one, name))}
        place = found.setdefault((one.frame, one.obj, one.correction), {})
        for name in shapes:
            if name in place:
                advice = "; give its points in one, x,y,1;x,y,0" if name == "points" else "; give one"
                raise InputError(f"object {one.obj} has two prompts in frame {one.frame}{advice}")
        place |= shapes
    return [Prompt(frame, obj, correction=correction, **shapes) for (frame, obj, correction), shapes in found.items()]


def _frame(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else -1
    if not 0 <= number <= _LARGEST_FRAME:
        raise InputError(f"frame {printable(repr(text), 60)}; give its number, counted from 0, as in {_FORMS}")
    return number


def _point(text: str) -> tuple[float, float, int]:
    parts = text.split(",")
    x, y = _numbers(",".join(parts[:2]), 2)
    if parts[2:] not in ([], ["0"], ["1"]):
        label = printable(repr(",".join(parts[2:])), 60)
        raise InputError(f"label {label} of a point; give x,y,1 on the object and x,y,0 beside it")
    return x, y, int(parts[2]) if parts[2:] else 1


def _numbers(text: str, count: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        what = "x,y or x,y,label" if count == 2 else "x0,y0,x1,y1"
        raise InputError(f"{printable(repr(text), 60)} are not {count} numbers; give {what} in pixels")
    return numbers
