"""Boxes in answers: read and written in the forms of vision-language models, converted, compared and drawn.

    found = vl3.boxes.parse_all("<ref>the cat</ref>[[56,42,390,484]]")  # [Box(0.056, 0.042, 0.39, 0.484, "the cat")]
    vl3.boxes.format(found, "qwen_vl")  # "<ref>the cat</ref><box>(56,42),(390,484)</box>"
    vl3.boxes.draw(image, found).save("cat_with_box.png")

A `Box` holds fractions of the image's width and height, so it suits the image at any size.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

UNITS = ("thousandths", "fractions", "pixels")  # what the numbers of a form without markup of its own mean
_LOC_BINS, _FLORENCE_BINS, _PATCHES = 1024, 1000, 32
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_FOUR = rf"\s*{_NUMBER}(?:\s*,\s*{_NUMBER}){{3}}\s*"
_CORNER = rf"[(\[]\s*{_NUMBER}\s*,\s*{_NUMBER}\s*[)\]]"
_BOX_KEYS, _LABEL_KEYS = "bbox_2d|box_2d|bbox|box", "label|name|text_content"
_PATTERN = re.compile(
    "|".join(
        (
            r"(?P<label><ref>.*?</ref>|<\|object_ref_start\|>.*?<\|object_ref_end\|>|<p>.*?</p>|<phrase>.*?</phrase>)",
            rf"""(?P<json>\{{[^{{}}]*["'](?:{_BOX_KEYS})["']\s*:\s*\[{_FOUR}\][^{{}}]*\}})""",
            r"(?P<paligemma>(?:<loc\d{4}>){4}(?:<seg\d{3}>)*[^<;\n]*)",
            r"(?P<florence2>(?:<loc_\d+>){4})",
            r"(?P<kosmos2><patch_index_\d+><patch_index_\d+>)",
            r"(?P<minigpt_v2>\{(?:<\d+>){4}\})",
            rf"(?P<corners>{_CORNER}\s*,?\s*{_CORNER})",
            rf"(?P<list>(?<=[\[(;]){_FOUR}(?=[\]);]))",
        )
    ),
    re.DOTALL,
)
# What may stand between a label and its boxes, and between the boxes of one label.
_GAP = re.compile(r"(?:\s|[\[\](){},:;]|</?box>|<\|box_(?:start|end)\|>|</?object>|</delimiter_of_multi_objects/>)*")


@dataclasses.dataclass(frozen=True)
class Box:
    """A box in fractions of the image's width and height, from its top left corner; corners in any order are put right.

    Attributes:
      x0: Left edge.
      y0: Upper edge.
      x1: Right edge.
      y1: Lower edge.
      label: What is in the box; empty if that is not said.

    Raises:
      ValueError: A coordinate is not a finite number.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    label: str = ""

    def __post_init__(self):
        edges = self.x0, self.y0, self.x1, self.y1
        if not all(map(math.isfinite, edges)):
            raise ValueError(f"a box has four finite numbers, not {edges}")
        for low, high in (("x0", "x1"), ("y0", "y1")):
            ends = sorted((float(getattr(self, low)), float(getattr(self, high))))
            object.__setattr__(self, low, ends[0])
            object.__setattr__(self, high, ends[1])

    @classmethod
    def from_xyxy(cls, edges: Sequence[float], size: Sequence[int], label: str = "") -> "Box":
        """Takes the left, upper, right and lower edge in pixels of an image of `size` (width, height)."""
        (x0, y0, x1, y1), (width, height) = edges, size
        return cls(x0 / width, y0 / height, x1 / width, y1 / height, label)

    @classmethod
    def from_xywh(cls, box: Sequence[float], size: Sequence[int], label: str = "") -> "Box":
        """Takes the left and upper edge, the width and the height in pixels, as COCO has them."""
        left, upper, width, height = box
        return cls.from_xyxy((left, upper, left + width, upper + height), size, label)

    def xyxy(self, size: Sequence[int]) -> tuple[float, float, float, float]:
        """Returns the left, upper, right and lower edge in pixels of an image of `size` (width, height)."""
        width, height = size
        return self.x0 * width, self.y0 * height, self.x1 * width, self.y1 * height

    def xywh(self, size: Sequence[int]) -> tuple[float, float, float, float]:
        """Returns the left and upper edge, the width and the height in pixels of an image of `size`."""
        x0, y0, x1, y1 = self.xyxy(size)
        return x0, y0, x1 - x0, y1 - y0

    def clipped(self) -> "Box":
        """Returns the part of the box that is within the image."""
        edges = (min(max(edge, 0.0), 1.0) for edge in (self.x0, self.y0, self.x1, self.y1))
        return Box(*edges, self.label)

    @property
    def area(self) -> float:
        """The share of the image that the box covers."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)

    def iou(self, other: "Box") -> float:
        """Returns the intersection over union with another box; 0 if both are empty."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        intersection = max(width, 0.0) * max(height, 0.0)
        union = self.area + other.area - intersection
        return intersection / union if union else 0.0


def parse_all(text: str, unit: str | None = None, size: Sequence[int] | None = None) -> list[Box]:
    """Returns all boxes of an answer in their order, with their labels; what is malformed is no box.

    The forms of `FORMS` are told apart by their markup. Of the numbers of lists, tuples and JSON objects nothing tells
    the unit. Unless it is given, four numbers up to 1 are fractions, up to 1000 thousandths, and larger ones pixels.

    Args:
      text: The answer.
      unit: One of `UNITS`.
      size: Width and height of the image that the model saw; pixels without it are left out.

    Raises:
      ValueError: There is no such unit, or it is "pixels" and no size is given.
    """
    if unit not in (None, *UNITS):
        raise ValueError(f"unit is {unit!r}; use one of {', '.join(UNITS)}")
    if unit == "pixels" and size is None:
        raise ValueError("pixels need the size of the image, (width, height)")
    boxes: list[Box] = []
    label, end = "", 0
    for match in _PATTERN.finditer(text):
        kind, content, gap = str(match.lastgroup), match[0], text[end : match.start()]
        end = match.end()
        if kind == "label":
            label = re.sub(r"^<[^>]*>|<[^>]*>$", "", content).strip()
            continue
        numbers = [float(number) for number in re.findall(_NUMBER, content)]
        if kind == "florence2":
            label = gap.rpartition(">")[2].strip(" ,.;\n") or label
        elif not _GAP.fullmatch(gap):
            label = ""
        own = label
        if kind == "json":
            own = _json_label(content) or label
            numbers = [float(number) for number in re.findall(_NUMBER, re.findall(rf"\[({_FOUR})\]", content)[0])]
            if "box_2d" in content and "bbox_2d" not in content:  # Gemini's order
                numbers = _swapped(numbers)
        elif kind == "paligemma":
            numbers, own = numbers[:4], content.rpartition(">")[2].strip()
        edges = _READERS[kind](numbers) if kind in _READERS else _fractions(numbers, unit, size)
        if edges is not None and all(map(math.isfinite, edges)):
            boxes.append(Box(*edges, own))
    return boxes


def parse(text: str, unit: str | None = None, size: Sequence[int] | None = None) -> Box:
    """Returns the only box of an answer.

    Args:
      text: The answer.
      unit: As of `parse_all`.
      size: As of `parse_all`.

    Raises:
      ValueError: There is none, or several.
    """
    boxes = parse_all(text, unit, size)
    if len(boxes) != 1:
        raise ValueError(f"expected one box and found {len(boxes)} in {text[:200]!r}")
    return boxes[0]


def format(boxes: Box | Iterable[Box], form: str = "list", size: Sequence[int] | None = None) -> str:
    """Writes boxes in a form that `parse_all` reads.

    Args:
      boxes: A box, or several.
      form: A key of `FORMS`.
      size: Width and height of the image, for forms in pixels.

    Raises:
      ValueError: There is no such form, or its size is missing.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; use one of {', '.join(FORMS)}")
    if form in ("pixels", "json_pixels") and size is None:
        raise ValueError(f"the form {form} needs the size of the image, (width, height)")
    boxes = [boxes] if isinstance(boxes, Box) else list(boxes)
    write, separator = FORMS[form]
    text = separator.join(write(box, size) for box in boxes)
    return f"[{text}]" if form in ("json", "json_pixels", "gemini") else text


def draw(image: Any, boxes: Box | Iterable[Box], width: int | None = None) -> Any:
    """Draws the outlines of boxes, and their labels, on a copy of an image.

    Args:
      image: A PIL image or an array [h, w, 3] uint8.
      boxes: A box, or several.
      width: Width of the lines in pixels; by default it suits the size of the image.

    Returns:
      A PIL image in RGB.
    """
    from PIL import Image, ImageDraw, ImageFont

    image = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    longest = max(image.size)
    line, font = width or max(longest // 256, 1), ImageFont.load_default(max(longest / 40, 10))
    canvas = ImageDraw.Draw(image)
    for number, box in enumerate([boxes] if isinstance(boxes, Box) else boxes):
        colour = _COLOURS[number % len(_COLOURS)]
        x0, y0, x1, y1 = box.clipped().xyxy(image.size)
        canvas.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=line)
        if box.label:
            left, upper, right, lower = canvas.textbbox((0, 0), box.label, font=font)
            corner = (max(min(x0, image.width - right), 0), max(y0 - lower, 0))
            canvas.rectangle((*corner, corner[0] + right - left, corner[1] + lower), fill=colour)
            canvas.text((corner[0] - left, corner[1] - upper // 2), box.label, fill="white", font=font)
    return image


def _fractions(numbers: Sequence[float], unit: str | None, size: Sequence[int] | None) -> list[float] | None:
    """Converts numbers of a unit, which None leaves to their size; None where they cannot be a box."""
    largest = max(map(abs, numbers))
    unit = unit or ("fractions" if largest <= 1 else "thousandths" if largest <= 1000 else "pixels")
    sides = {"fractions": (1, 1), "thousandths": (1000, 1000)}.get(unit, size)
    return None if sides is None else [number / side for number, side in zip(numbers, (*sides, *sides), strict=True)]


def _swapped(numbers: Sequence[float]) -> list[float]:
    """Exchanges columns and rows."""
    return [numbers[index] for index in (1, 0, 3, 2)]


def _json_label(content: str) -> str:
    found = re.search(rf"""["'](?:{_LABEL_KEYS})["']\s*:\s*("(?:[^"\\]|\\.)*"|'[^']*')""", content)
    if not found:
        return ""
    try:
        return json.loads(found[1])
    except ValueError:
        return found[1][1:-1]


def _from_patches(numbers: Sequence[float]) -> list[float]:
    """Converts two patches of a 32 x 32 grid: their centres, or their outer edges where they share a row or column."""
    (row0, column0), (row1, column1) = (divmod(int(number), _PATCHES) for number in numbers)
    low, high = (0.0, 1.0) if row0 == row1 or column0 == column1 else (0.5, 0.5)
    return [(cell + part) / _PATCHES for cell, part in ((column0, low), (row0, low), (column1, high), (row1, high))]


_READERS: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "paligemma": lambda numbers: _swapped([number / _LOC_BINS for number in numbers]),
    "florence2": lambda numbers: [(number + 0.5) / _FLORENCE_BINS for number in numbers],
    "kosmos2": _from_patches,
    "minigpt_v2": lambda numbers: [number / 100 for number in numbers],
}


def _rounded(box: Box, scale: int) -> list[int]:
    return [round(edge * scale) for edge in (box.x0, box.y0, box.x1, box.y1)]


def _bins(box: Box, count: int) -> list[int]:
    """Returns the bins, of so many over the image, that the edges fall into."""
    box = box.clipped()
    return [min(int(edge * count), count - 1) for edge in (box.x0, box.y0, box.x1, box.y1)]


def _pixels(box: Box, size: Any) -> list[int]:
    return [round(edge) for edge in box.xyxy(size)]


def _labelled(start: str, stop: str, box: Box) -> str:
    return f"{start}{box.label}{stop}" if box.label else ""


def _corners(box: Box) -> str:
    return "({},{}),({},{})".format(*_rounded(box, 1000))


def _patches(box: Box) -> str:
    x0, y0, x1, y1 = _bins(box, _PATCHES)
    # The patch that ends at an edge, not the one that begins there.
    x1, y1 = (max(math.ceil(edge * _PATCHES) - 1, 0) for edge in (box.clipped().x1, box.clipped().y1))
    indices = (y0 * _PATCHES + x0, max(y1, y0) * _PATCHES + max(x1, x0))
    return "<object>{}</object>".format("".join(f"<patch_index_{index:04}>" for index in indices))


def _json(box: Box, numbers: Sequence[int], key: str = "bbox_2d") -> str:
    return json.dumps({key: list(numbers)} | ({"label": box.label} if box.label else {}), ensure_ascii=False)


# How a box is written, and what stands between two of them. docs/inference.md names the models of each form.
FORMS: dict[str, tuple[Callable[[Box, Any], str], str]] = {
    "list": (lambda box, _: str(_rounded(box, 1000)), ", "),
    "fractions": (
        lambda box, _: "[{}]".format(", ".join(f"{edge:.3f}" for edge in (box.x0, box.y0, box.x1, box.y1))),
        ", ",
    ),
    "pixels": (lambda box, size: str(_pixels(box, size)), ", "),
    "ref": (
        lambda box, _: "{}[[{}]]".format(_labelled("<ref>", "</ref>", box), ",".join(map(str, _rounded(box, 1000)))),
        "",
    ),
    "qwen_vl": (lambda box, _: f"{_labelled('<ref>', '</ref>', box)}<box>{_corners(box)}</box>", ""),
    "qwen2_vl": (
        lambda box, _: (
            f"{_labelled('<|object_ref_start|>', '<|object_ref_end|>', box)}<|box_start|>{_corners(box)}<|box_end|>"
        ),
        "",
    ),
    "internvl": (lambda box, _: f"{_labelled('<ref>', '</ref>', box)}<box>[{_rounded(box, 1000)}]</box>", ""),
    "json": (lambda box, _: _json(box, _rounded(box, 1000)), ", "),
    "json_pixels": (lambda box, size: _json(box, _pixels(box, size)), ", "),
    "gemini": (
        lambda box, _: _json(box, [round(number) for number in _swapped(_rounded(box, 1000))], "box_2d"),
        ", ",
    ),
    "paligemma": (
        lambda box, _: (
            "".join(f"<loc{int(number):04}>" for number in _swapped(_bins(box, _LOC_BINS))) + f" {box.label}"
        ),
        " ; ",
    ),
    "florence2": (
        lambda box, _: box.label + "".join(f"<loc_{number}>" for number in _bins(box, _FLORENCE_BINS)),
        "",
    ),
    "kosmos2": (lambda box, _: _labelled("<phrase>", "</phrase>", box) + _patches(box), " "),
    "minigpt_v2": (
        lambda box, _: "{}{{{}}}".format(
            _labelled("<p>", "</p> ", box), "".join(f"<{number}>" for number in _rounded(box, 100))
        ),
        " ",
    ),
}
