"""Naming objects and colours, and reading numbers."""

from collections.abc import Sequence

from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import LARGE, SMALL, SceneSampler
from data_pipelines.synthetic.scenes import PlacedObject, Scene
from data_pipelines.synthetic.vocabulary import DIGITS, KINDS, NAMES

NAME_OF = {
    "digit": ("Which digit is this?", "Which digit do you see?", "Read the digit."),
    "fashion": ("Which fashion item is this?", "What kind of clothing is this?", "Name the fashion item."),
    "shape": ("Which shape is this?", "What shape do you see?", "Name the shape."),
}
COLOUR = ("What colour is it?", "Which colour does it have?", "Name the colour.")
COLOUR_OF = ("What colour is the {name}?", "Which colour does the {name} have?", "Name the colour of the {name}.")
NUMBER = ("Which number is this?", "Read the number.", "What number is written here?")


def name_of(kind: str, sampler: SceneSampler) -> Example:
    """The value of a handwritten digit, or the name of a piece of clothing or of a geometric shape."""
    scene = alone(sampler, (kind,))
    return Example((scene,), ((sampler.choice(NAME_OF[kind]), scene.objects[0].sprite.name),))


def colour(sampler: SceneSampler) -> Example:
    """The colour of the only object."""
    scene = alone(sampler, KINDS)
    return Example((scene,), ((sampler.choice(COLOUR), scene.objects[0].sprite.colour),))


def colour_of(sampler: SceneSampler) -> Example:
    """The colour of the named one of two or three objects."""
    scene = several(sampler, sampler.integer(2, 3))
    asked = sampler.choice(scene.objects).sprite
    question = sampler.choice(COLOUR_OF).format(name=asked.name)
    return Example((scene,), ((question, asked.colour),), {"asked": asked.name})


def number(sampler: SceneSampler) -> Example:
    """The number that a row of two to four handwritten digits shows."""
    count = sampler.integer(2, 4)
    height, side = sampler.choice(((56, 28), (56, 30), (70, 34), (84, 38)))
    names = [sampler.choice(DIGITS) for _ in range(count)]
    colours = sampler.distinct_colours(1) * count if sampler.bernoulli(0.6) else [sampler.colour() for _ in names]
    sprites = [sampler.sprite("digit", name, colour, side) for name, colour in zip(names, colours, strict=True)]
    x, drift = sampler.integer(3, 9), sampler.integer(0, height - side - 6)
    corners = []
    for sprite in sprites:
        corners.append((x, drift + sampler.integer(0, 6) + (side - sprite.height) // 2))
        x += sprite.width + sampler.integer(2, 6)
    # Wide enough for the digits, and a multiple of the side of a merge block.
    width = max(-(-(x + 2) // 28) * 28, 56)
    shift = sampler.integer(0, width - x - 2)
    objects = [PlacedObject(sprite, x + shift, y) for sprite, (x, y) in zip(sprites, corners, strict=True)]
    scene = sampler.scene(height, width, *objects)
    return Example((scene,), ((sampler.choice(NUMBER), "".join(names)),))


def alone(
    sampler: SceneSampler, kinds: Sequence[str], name: str | None = None, shares: tuple[float, float] = (0.55, 0.9)
) -> Scene:
    """Makes an image of one object.

    Args:
      sampler: Makes the random choices.
      kinds: Kinds of objects to choose from.
      name: Name of the object; chosen at random if None.
      shares: Range of the object's longer side as a share of the image's shorter side.
    """
    height, width = sampler.size(SMALL)
    kind = sampler.choice(kinds)
    name = name or sampler.choice(NAMES[kind])
    smaller = min(height, width)
    side = sampler.integer(shares[0] * smaller, shares[1] * smaller)
    sprite = sampler.sprite(kind, name, sampler.colour(), side)
    return sampler.scene(height, width, sampler.place_object(sprite, (0, 0, width, height)))


def several(sampler: SceneSampler, count: int) -> Scene:
    """Makes an image of separate objects with different names and colours; two objects are in reading order."""
    height, width = sampler.size(LARGE)
    regions = sampler.halves(height, width) if count == 2 else sampler.cells(count, height, width)
    largest = 0.85 if count == 2 else 1.0
    looks = sampler.distinct_looks(count)
    objects = [sampler.fill(region, look, 0.7, largest) for region, look in zip(regions, looks, strict=True)]
    return sampler.scene(height, width, *objects)
