"""Counting objects, and locating a single object in a 3 x 3 grid."""

from data_pipelines.synthetic.formats import position_of
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import LARGE, SMALL, SceneSampler
from data_pipelines.synthetic.scenes import PlacedObject, Scene
from data_pipelines.synthetic.vocabulary import COUNTS, NAMES, POSITIONS

COUNT = ("How many things are there?", "Count the things.", "How many do you see?")
POSITION = ("Where is it?", "In which part of the picture is it?", "What is its place?")
_EDGE = 0.1  # minimum distance of an object's centre from the border of its grid cell, as a share of the cell


def count(sampler: SceneSampler) -> Example:
    """How many of one to five separate objects there are; they have one name or random names."""
    answer = sampler.choice(COUNTS)
    height, width = sampler.size(LARGE)
    same = sampler.kind_and_name() if sampler.bernoulli(0.5) else None
    one_colour = sampler.colour() if sampler.bernoulli(0.5) else None
    objects = []
    for region in sampler.cells(answer, height, width):
        kind, name = same or sampler.kind_and_name()
        objects.append(sampler.fill(region, (kind, name, one_colour or sampler.colour()), 0.65))
    scene = sampler.scene(height, width, *objects)
    return Example((scene,), ((sampler.choice(COUNT), str(answer)),))


def position(sampler: SceneSampler) -> Example:
    """In which cell of a 3 x 3 grid the only object is."""
    scene = object_in_cell(sampler)
    answer = position_of(scene.objects[0].box, scene.height, scene.width)
    return Example((scene,), ((sampler.choice(POSITION), answer),))


def object_in_cell(sampler: SceneSampler) -> Scene:
    """Makes an image of one object, whose centre is well within a random cell of a 3 x 3 grid."""
    height, width = sampler.size(SMALL)
    row, column = divmod(sampler.integer(0, len(POSITIONS) - 1), 3)
    kind = sampler.choice(list(NAMES))
    side = sampler.integer(18, 0.48 * min(height, width))
    sprite = sampler.sprite(kind, sampler.choice(NAMES[kind]), sampler.colour(), side)
    x = _offset(sampler, column, width, sprite.width)
    y = _offset(sampler, row, height, sprite.height)
    return sampler.scene(height, width, PlacedObject(sprite, x, y))


def _offset(sampler: SceneSampler, third: int, length: int, size: int) -> int:
    """Returns an offset with which an object of this size has its centre in this third and lies within the image."""
    low, high = (third + _EDGE) * length / 3, (third + 1 - _EDGE) * length / 3
    first, last = max(-(-(low - size / 2) // 1), 0), min((high - size / 2) // 1, length - size)
    return sampler.integer(first, last)
