"""How many there are, and where the only one is."""

from data_pipelines.synthetic.formats import position_of
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import SceneSampler
from data_pipelines.synthetic.scenes import PlacedObject
from data_pipelines.synthetic.vocabulary import COLOURS, COUNTS, NAMES, POSITIONS

COUNT = ("How many things are there?", "Count the things.", "How many do you see?")
PLACE = ("Where is it?", "In which part of the picture is it?", "What is its place?")
_EDGE = 0.1  # share of a ninth of the picture that the middle of a thing keeps from its border


def count(sampler: SceneSampler) -> Example:
    """One to five things, apart from each other: all of one name, or of any."""
    answer = sampler.pick(COUNTS)
    height, width = sampler.large_size()
    same = sampler.kind_and_name() if sampler.chance(0.5) else None
    one_colour = sampler.pick(list(COLOURS)) if sampler.chance(0.5) else None
    placed = []
    for region in sampler.cells(answer, height, width):
        kind, name = same or sampler.kind_and_name()
        room = min(region[2] - region[0], region[3] - region[1]) - 2
        its_colour = one_colour or sampler.pick(list(COLOURS))
        sprite = sampler.sprite(kind, name, its_colour, sampler.between(0.65 * room, room))
        placed.append(sampler.placed(sprite, region))
    scene = sampler.scene(height, width, *placed)
    truth = {"answer": str(answer), "media": [scene.facts()]}
    return Example((scene,), ((sampler.pick(COUNT), str(answer)),), truth)


def position(sampler: SceneSampler) -> Example:
    """In which ninth of the picture the only thing is."""
    placed, height, width = in_a_ninth(sampler)
    scene = sampler.scene(height, width, placed)
    answer = position_of(placed.box, height, width)
    return Example((scene,), ((sampler.pick(PLACE), answer),), {"answer": answer, "media": [scene.facts()]})


def in_a_ninth(sampler: SceneSampler) -> tuple[PlacedObject, int, int]:
    """A thing whose middle is well within one ninth, all nine equally likely; with height and width."""
    height, width = sampler.small_size()
    row, column = divmod(sampler.between(0, len(POSITIONS) - 1), 3)
    kind = sampler.pick(list(NAMES))
    side = sampler.between(18, 0.48 * min(height, width))
    sprite = sampler.sprite(kind, sampler.pick(NAMES[kind]), sampler.pick(list(COLOURS)), side)
    x = _along(sampler, column, width, sprite.width)
    y = _along(sampler, row, height, sprite.height)
    return PlacedObject(sprite, x, y), height, width


def _along(sampler: SceneSampler, third: int, length: int, size: int) -> int:
    """Where a thing of this size begins, so that its middle is in this third and it lies within the picture."""
    low, high = (third + _EDGE) * length / 3, (third + 1 - _EDGE) * length / 3
    first, last = max(-(-(low - size / 2) // 1), 0), min((high - size / 2) // 1, length - size)
    return sampler.between(first, last)
