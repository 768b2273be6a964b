"""Naming, reading, colour: what one thing is."""

from collections.abc import Sequence

from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scenes import Placed, Still
from data_pipelines.synthetic.studio import Studio
from data_pipelines.synthetic.vocabulary import COLOURS, DIGITS, KINDS, NAMES

DIGIT = ("Which digit is this?", "Which digit do you see?", "Read the digit.")
FASHION = ("Which fashion item is this?", "What kind of clothing is this?", "Name the fashion item.")
SHAPE = ("Which shape is this?", "What shape do you see?", "Name the shape.")
COLOUR = ("What colour is it?", "Which colour does it have?", "Name the colour.")
COLOUR_OF = ("What colour is the {name}?", "Which colour does the {name} have?", "Name the colour of the {name}.")
NUMBER = ("Which number is this?", "Read the number.", "What number is written here?")


def digit(studio: Studio) -> Example:
    """One handwritten digit."""
    return _name(studio, "digit", DIGIT)


def fashion(studio: Studio) -> Example:
    """One thing to wear."""
    return _name(studio, "fashion", FASHION)


def shape(studio: Studio) -> Example:
    """One drawn shape."""
    return _name(studio, "shape", SHAPE)


def colour(studio: Studio) -> Example:
    """The colour of the only thing."""
    still = alone(studio, KINDS)
    answer = still.placed[0].thing.colour
    return Example((still,), ((studio.pick(COLOUR), answer),), {"answer": answer, "media": [still.facts()]})


def colour_of(studio: Studio) -> Example:
    """The colour of the one of two or three that is named."""
    still = several(studio, studio.between(2, 3))
    asked = studio.pick(still.placed).thing
    question = studio.pick(COLOUR_OF).format(name=asked.name)
    truth = {"answer": asked.colour, "asked": asked.name, "media": [still.facts()]}
    return Example((still,), ((question, asked.colour),), truth)


def number(studio: Studio) -> Example:
    """A row of two to four handwritten digits."""
    count = studio.between(2, 4)
    height, side = studio.pick(((56, 28), (56, 30), (70, 34), (84, 38)))
    names = [studio.pick(DIGITS) for _ in range(count)]
    own = studio.colours(1) if studio.chance(0.6) else [studio.pick(list(COLOURS)) for _ in range(count)]
    things = [studio.thing("digit", name, own[rank % len(own)], side) for rank, name in enumerate(names)]
    placed, x = [], studio.between(3, 9)
    drift = studio.between(0, height - side - 6)
    for thing in things:
        y = drift + studio.between(0, 6) + (side - thing.height) // 2
        placed.append(Placed(thing, x, y))
        x += thing.width + studio.between(2, 6)
    # Wide enough for the digits, and a whole number of merge blocks.
    width = max(-(-(x + 2) // 28) * 28, 56)
    shift = studio.between(0, width - x - 2)
    still = studio.still(height, width, *(Placed(one.thing, one.x + shift, one.y) for one in placed))
    answer = "".join(names)
    return Example((still,), ((studio.pick(NUMBER), answer),), {"answer": answer, "media": [still.facts()]})


def alone(
    studio: Studio, kinds: Sequence[str], name: str | None = None, shares: tuple[float, float] = (0.55, 0.9)
) -> Still:
    """A picture of one thing, whose longer side is this share of the shorter side of the picture."""
    height, width = studio.small_size()
    kind = studio.pick(kinds)
    name = name or studio.pick(NAMES[kind])
    smaller = min(height, width)
    side = studio.between(shares[0] * smaller, shares[1] * smaller)
    thing = studio.thing(kind, name, studio.pick(list(COLOURS)), side)
    return studio.still(height, width, studio.placed(thing, (0, 0, width, height)))


def several(studio: Studio, count: int) -> Still:
    """A picture of two or three things of different names and colours, which do not touch; in reading order if two."""
    height, width = studio.large_size()
    regions = studio.halves(height, width) if count == 2 else studio.cells(count, height, width)
    largest = 0.85 if count == 2 else 1.0
    placed = []
    for (kind, name), its_colour, region in zip(studio.different(count), studio.colours(count), regions, strict=True):
        room = min(region[2] - region[0], region[3] - region[1]) * largest - 2
        placed.append(studio.placed(studio.thing(kind, name, its_colour, studio.between(0.7 * room, room)), region))
    return studio.still(height, width, *placed)


def _name(studio: Studio, kind: str, templates: Sequence[str]) -> Example:
    still = alone(studio, (kind,))
    answer = still.placed[0].thing.name
    return Example((still,), ((studio.pick(templates), answer),), {"answer": answer, "media": [still.facts()]})
