"""Counting objects, and locating a single object in a 3 x 3 grid."""

from data_pipelines.synthetic.formats import position_of
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import SceneSampler
from data_pipelines.synthetic.scenes import PlacedObject
from data_pipelines.synthetic.vocabulary import COLOURS, COUNTS, NAMES, POSITIONS

COUNT = ("How many things are there?", "Count the things.", "How many do you see?")
POSITION = ("Where is it?", "In which part of the picture is it?", "What is its place?")
_EDGE = 0.1  # minimum distance of an object's centre from the border of its grid cell, as a share of the cell


def count(sampler: SceneSampler) -> Example:
    """How many of one to five separate objects there are; they have one name or random names."""
    answer = sampler.choice(COUNTS)
    height, width = sampler.large_size()
    same = sampler.kind_and_name() if sampler.bernoulli(0.5) else None
    one_colour = sampler.choice(list(COLOURS)) if sampler.bernoulli(0.5) else None
    objects = []
    for region in sampler.cells(answer, height, width):
        kind, name = same or sampler.kind_and_name()
        available = min(region[2] - region[0], region[3] - region[1]) - 2
        colour = one_colour or sampler.choice(list(COLOURS))
        sprite = sampler.sprite(kind, name, colour, sampler.integer(0.65 * available, available))
        objects.append(sampler.place_object(sprite, region))
    scene = sampler.scene(height, width, *objects)
    reference = {"answer": str(answer), "media": [scene.facts()]}
    return Example((scene,), ((sampler.choice(COUNT), str(answer)),), reference)


def position(sampler: SceneSampler) -> Example:
    """In which cell of a 3 x 3 grid the only object is."""
    placed, height, width = object_in_cell(sampler)
    scene = sampler.scene(height, width, placed)
    answer = position_of(placed.box, height, width)
    return Example((scene,), ((sampler.choice(POSITION), answer),), {"answer": answer, "media": [scene.facts()]})


def object_in_cell(sampler: SceneSampler) -> tuple[PlacedObject, int, int]:
    """Places an object with its centre well within a random cell of a 3 x 3 grid.

    Returns:
      The object, and height and width of the image.
    """
    height, width = sampler.small_size()
    row, column = divmod(sampler.integer(0, len(POSITIONS) - 1), 3)
    kind = sampler.choice(list(NAMES))
    side = sampler.integer(18, 0.48 * min(height, width))
    sprite = sampler.sprite(kind, sampler.choice(NAMES[kind]), sampler.choice(list(COLOURS)), side)
    x = _offset(sampler, column, width, sprite.width)
    y = _offset(sampler, row, height, sprite.height)
    return PlacedObject(sprite, x, y), height, width


def _offset(sampler: SceneSampler, third: int, length: int, size: int) -> int:
    """Returns an offset with which an object of this size has its centre in this third and lies within the image."""
    low, high = (third + _EDGE) * length / 3, (third + 1 - _EDGE) * length / 3
    first, last = max(-(-(low - size / 2) // 1), 0), min((high - size / 2) // 1, length - size)
    return sampler.integer(first, last)
