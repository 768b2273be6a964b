"""Naming objects and colours, and reading numbers."""

from collections.abc import Sequence

from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import SceneSampler
from data_pipelines.synthetic.scenes import PlacedObject, Scene
from data_pipelines.synthetic.vocabulary import COLOURS, DIGITS, KINDS, NAMES

DIGIT = ("Which digit is this?", "Which digit do you see?", "Read the digit.")
FASHION = ("Which fashion item is this?", "What kind of clothing is this?", "Name the fashion item.")
SHAPE = ("Which shape is this?", "What shape do you see?", "Name the shape.")
COLOUR = ("What colour is it?", "Which colour does it have?", "Name the colour.")
COLOUR_OF = ("What colour is the {name}?", "Which colour does the {name} have?", "Name the colour of the {name}.")
NUMBER = ("Which number is this?", "Read the number.", "What number is written here?")


def digit(sampler: SceneSampler) -> Example:
    """The value of a handwritten digit."""
    return _name(sampler, "digit", DIGIT)


def fashion(sampler: SceneSampler) -> Example:
    """The name of a piece of clothing."""
    return _name(sampler, "fashion", FASHION)


def shape(sampler: SceneSampler) -> Example:
    """The name of a geometric shape."""
    return _name(sampler, "shape", SHAPE)


def colour(sampler: SceneSampler) -> Example:
    """The colour of the only object."""
    scene = alone(sampler, KINDS)
    answer = scene.objects[0].sprite.colour
    return Example((scene,), ((sampler.choice(COLOUR), answer),), {"answer": answer, "media": [scene.facts()]})


def colour_of(sampler: SceneSampler) -> Example:
    """The colour of the named one of two or three objects."""
    scene = several(sampler, sampler.integer(2, 3))
    asked = sampler.choice(scene.objects).sprite
    question = sampler.choice(COLOUR_OF).format(name=asked.name)
    reference = {"answer": asked.colour, "asked": asked.name, "media": [scene.facts()]}
    return Example((scene,), ((question, asked.colour),), reference)


def number(sampler: SceneSampler) -> Example:
    """The number that a row of two to four handwritten digits shows."""
    count = sampler.integer(2, 4)
    height, side = sampler.choice(((56, 28), (56, 30), (70, 34), (84, 38)))
    names = [sampler.choice(DIGITS) for _ in range(count)]
    colours = (
        sampler.distinct_colours(1) if sampler.bernoulli(0.6) else [sampler.choice(list(COLOURS)) for _ in range(count)]
    )
    sprites = [sampler.sprite("digit", name, colours[rank % len(colours)], side) for rank, name in enumerate(names)]
    objects, x = [], sampler.integer(3, 9)
    drift = sampler.integer(0, height - side - 6)
    for sprite in sprites:
        y = drift + sampler.integer(0, 6) + (side - sprite.height) // 2
        objects.append(PlacedObject(sprite, x, y))
        x += sprite.width + sampler.integer(2, 6)
    # Wide enough for the digits, and a multiple of the side of a merge block.
    width = max(-(-(x + 2) // 28) * 28, 56)
    shift = sampler.integer(0, width - x - 2)
    scene = sampler.scene(
        height, width, *(PlacedObject(placed.sprite, placed.x + shift, placed.y) for placed in objects)
    )
    answer = "".join(names)
    return Example((scene,), ((sampler.choice(NUMBER), answer),), {"answer": answer, "media": [scene.facts()]})


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
    height, width = sampler.small_size()
    kind = sampler.choice(kinds)
    name = name or sampler.choice(NAMES[kind])
    smaller = min(height, width)
    side = sampler.integer(shares[0] * smaller, shares[1] * smaller)
    sprite = sampler.sprite(kind, name, sampler.choice(list(COLOURS)), side)
    return sampler.scene(height, width, sampler.place_object(sprite, (0, 0, width, height)))


def several(sampler: SceneSampler, count: int) -> Scene:
    """Makes an image of separate objects with different names and colours; two objects are in reading order."""
    height, width = sampler.large_size()
    regions = sampler.halves(height, width) if count == 2 else sampler.cells(count, height, width)
    largest = 0.85 if count == 2 else 1.0
    objects = []
    for (kind, name), colour, region in zip(
        sampler.distinct_names(count), sampler.distinct_colours(count), regions, strict=True
    ):
        available = min(region[2] - region[0], region[3] - region[1]) * largest - 2
        sprite = sampler.sprite(kind, name, colour, sampler.integer(0.7 * available, available))
        objects.append(sampler.place_object(sprite, region))
    return sampler.scene(height, width, *objects)


def _name(sampler: SceneSampler, kind: str, templates: Sequence[str]) -> Example:
    scene = alone(sampler, (kind,))
    answer = scene.objects[0].sprite.name
    return Example((scene,), ((sampler.choice(templates), answer),), {"answer": answer, "media": [scene.facts()]})
