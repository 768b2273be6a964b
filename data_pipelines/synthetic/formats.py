"""Text formats of answers: boxes in thousandths, spans of seconds, positions, captions."""

from collections.abc import Sequence

from data_pipelines.synthetic.scenes import Box
from data_pipelines.synthetic.vocabulary import POSITIONS, with_article

BOX_FORMAT = "Answer in [[x0,y0,x1,y1]] format."


def thousandths(box: Box, height: int, width: int) -> list[int]:
    """Converts a box x0, y0, x1, y1 from pixels to integers 0..1000, in thousandths of width and height."""
    sides = (width, height, width, height)
    return [min(int(value / side * 1000), 1000) for value, side in zip(box, sides, strict=True)]


def box_answer(name: str, box: Sequence[int]) -> str:
    """Formats a box in thousandths, e.g. `<ref>the bag</ref>[[56,42,390,484]]`."""
    return f"<ref>the {name}</ref>[[{','.join(map(str, box))}]]"


def span_answer(start: float, end: float) -> str:
    """Formats a span of seconds, e.g. '3.0-7.0 s'."""
    return f"{start:.1f}-{end:.1f} s"


def position_of(box: Box, height: int, width: int) -> str:
    """Returns the cell of a 3 x 3 grid over the image that the centre of a box falls into, one of `POSITIONS`."""
    column = min(int((box[0] + box[2]) / 2 * 3 / width), 2)
    row = min(int((box[1] + box[3]) / 2 * 3 / height), 2)
    return POSITIONS[row * 3 + column]


def position_phrase(position: str) -> str:
    """Returns a position with its preposition: 'at the top left', 'on the left', 'in the middle'."""
    preposition = {"middle": "in", "left": "on", "right": "on"}.get(position, "at")
    return f"{preposition} the {position}"


def object_phrase(colour: str, name: str) -> str:
    """Returns colour and name: 'a red circle', 'an orange bag', 'blue trousers'."""
    return with_article(f"{colour} {name}")
