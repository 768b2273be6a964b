"""How many there are, and where the only one is."""

from data_pipelines.synthetic.formats import place_of
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scenes import Placed
from data_pipelines.synthetic.studio import Studio
from data_pipelines.synthetic.vocabulary import COLOURS, COUNTS, NAMES, PLACES

COUNT = ("How many things are there?", "Count the things.", "How many do you see?")
PLACE = ("Where is it?", "In which part of the picture is it?", "What is its place?")
_EDGE = 0.1  # share of a ninth of the picture that the middle of a thing keeps from its border


def count(studio: Studio) -> Example:
    """One to five things, apart from each other: all of one name, or of any."""
    answer = studio.pick(COUNTS)
    height, width = studio.large_size()
    same = studio.kind_and_name() if studio.chance(0.5) else None
    one_colour = studio.pick(list(COLOURS)) if studio.chance(0.5) else None
    placed = []
    for region in studio.cells(answer, height, width):
        kind, name = same or studio.kind_and_name()
        room = min(region[2] - region[0], region[3] - region[1]) - 2
        its_colour = one_colour or studio.pick(list(COLOURS))
        thing = studio.thing(kind, name, its_colour, studio.between(0.65 * room, room))
        placed.append(studio.placed(thing, region))
    still = studio.still(height, width, *placed)
    truth = {"answer": str(answer), "media": [still.facts()]}
    return Example((still,), ((studio.pick(COUNT), str(answer)),), truth)


def position(studio: Studio) -> Example:
    """In which ninth of the picture the only thing is."""
    placed, height, width = in_a_ninth(studio)
    still = studio.still(height, width, placed)
    answer = place_of(placed.box, height, width)
    return Example((still,), ((studio.pick(PLACE), answer),), {"answer": answer, "media": [still.facts()]})


def in_a_ninth(studio: Studio) -> tuple[Placed, int, int]:
    """A thing whose middle is well within one ninth, all nine equally likely; with height and width."""
    height, width = studio.small_size()
    row, column = divmod(studio.between(0, len(PLACES) - 1), 3)
    kind = studio.pick(list(NAMES))
    side = studio.between(18, 0.48 * min(height, width))
    thing = studio.thing(kind, studio.pick(NAMES[kind]), studio.pick(list(COLOURS)), side)
    x = _along(studio, column, width, thing.width)
    y = _along(studio, row, height, thing.height)
    return Placed(thing, x, y), height, width


def _along(studio: Studio, third: int, length: int, size: int) -> int:
    """Where a thing of this size begins, so that its middle is in this third and it lies within the picture."""
    low, high = (third + _EDGE) * length / 3, (third + 1 - _EDGE) * length / 3
    first, last = max(-(-(low - size / 2) // 1), 0), min((high - size / 2) // 1, length - size)
    return studio.between(first, last)
