"""How answers are written: boxes in thousandths, spans of seconds, places, captions."""

from collections.abc import Sequence

from data_pipelines.synthetic.scenes import Box
from data_pipelines.synthetic.sprites import Sprite
from data_pipelines.synthetic.vocabulary import POSITIONS, with_article

BOX_FORMAT = "Answer in [[x0,y0,x1,y1]] format."


def thousandths(box: Box, height: int, width: int) -> list[int]:
    """x0, y0, x1, y1 in pixels -> integers 0..1000 of width and height."""
    sides = (width, height, width, height)
    return [min(int(value / side * 1000), 1000) for value, side in zip(box, sides, strict=True)]


def box_answer(name: str, box: Sequence[int]) -> str:
    """`<ref>the bag</ref>[[56,42,390,484]]`; `box` in thousandths."""
    return f"<ref>the {name}</ref>[[{','.join(map(str, box))}]]"


def span_answer(start: float, end: float) -> str:
    """'3.0-7.0 s'."""
    return f"{start:.1f}-{end:.1f} s"


def position_of(box: Box, height: int, width: int) -> str:
    """In which ninth of the picture the middle of a box lies."""
    column = min(int((box[0] + box[2]) / 2 * 3 / width), 2)
    row = min(int((box[1] + box[3]) / 2 * 3 / height), 2)
    return POSITIONS[row * 3 + column]


def position_phrase(place: str) -> str:
    """'at the top left', 'on the left', 'in the middle'."""
    preposition = {"middle": "in", "left": "on", "right": "on"}.get(place, "at")
    return f"{preposition} the {place}"


def object_phrase(sprite: Sprite) -> str:
    """'a red circle', 'an orange bag', 'blue trousers'."""
    return with_article(f"{sprite.colour} {sprite.name}")
