"""Naming, reading, colour: what one thing is."""

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
    """One handwritten digit."""
    return _name(sampler, "digit", DIGIT)


def fashion(sampler: SceneSampler) -> Example:
    """One thing to wear."""
    return _name(sampler, "fashion", FASHION)


def shape(sampler: SceneSampler) -> Example:
    """One drawn shape."""
    return _name(sampler, "shape", SHAPE)


def colour(sampler: SceneSampler) -> Example:
    """The colour of the only thing."""
    scene = alone(sampler, KINDS)
    answer = scene.placed[0].sprite.colour
    return Example((scene,), ((sampler.pick(COLOUR), answer),), {"answer": answer, "media": [scene.facts()]})


def colour_of(sampler: SceneSampler) -> Example:
    """The colour of the one of two or three that is named."""
    scene = several(sampler, sampler.between(2, 3))
    asked = sampler.pick(scene.placed).sprite
    question = sampler.pick(COLOUR_OF).format(name=asked.name)
    truth = {"answer": asked.colour, "asked": asked.name, "media": [scene.facts()]}
    return Example((scene,), ((question, asked.colour),), truth)


def number(sampler: SceneSampler) -> Example:
    """A row of two to four handwritten digits."""
    count = sampler.between(2, 4)
    height, side = sampler.pick(((56, 28), (56, 30), (70, 34), (84, 38)))
    names = [sampler.pick(DIGITS) for _ in range(count)]
    own = sampler.colours(1) if sampler.chance(0.6) else [sampler.pick(list(COLOURS)) for _ in range(count)]
    sprites = [sampler.sprite("digit", name, own[rank % len(own)], side) for rank, name in enumerate(names)]
    placed, x = [], sampler.between(3, 9)
    drift = sampler.between(0, height - side - 6)
    for sprite in sprites:
        y = drift + sampler.between(0, 6) + (side - sprite.height) // 2
        placed.append(PlacedObject(sprite, x, y))
        x += sprite.width + sampler.between(2, 6)
    # Wide enough for the digits, and a whole number of merge blocks.
    width = max(-(-(x + 2) // 28) * 28, 56)
    shift = sampler.between(0, width - x - 2)
    scene = sampler.scene(height, width, *(PlacedObject(one.sprite, one.x + shift, one.y) for one in placed))
    answer = "".join(names)
    return Example((scene,), ((sampler.pick(NUMBER), answer),), {"answer": answer, "media": [scene.facts()]})


def alone(
    sampler: SceneSampler, kinds: Sequence[str], name: str | None = None, shares: tuple[float, float] = (0.55, 0.9)
) -> Scene:
    """A picture of one thing, whose longer side is this share of the shorter side of the picture."""
    height, width = sampler.small_size()
    kind = sampler.pick(kinds)
    name = name or sampler.pick(NAMES[kind])
    smaller = min(height, width)
    side = sampler.between(shares[0] * smaller, shares[1] * smaller)
    sprite = sampler.sprite(kind, name, sampler.pick(list(COLOURS)), side)
    return sampler.scene(height, width, sampler.placed(sprite, (0, 0, width, height)))


def several(sampler: SceneSampler, count: int) -> Scene:
    """A picture of two or three things of different names and colours, which do not touch; in reading order if two."""
    height, width = sampler.large_size()
    regions = sampler.halves(height, width) if count == 2 else sampler.cells(count, height, width)
    largest = 0.85 if count == 2 else 1.0
    placed = []
    for (kind, name), its_colour, region in zip(sampler.different(count), sampler.colours(count), regions, strict=True):
        room = min(region[2] - region[0], region[3] - region[1]) * largest - 2
        placed.append(sampler.placed(sampler.sprite(kind, name, its_colour, sampler.between(0.7 * room, room)), region))
    return sampler.scene(height, width, *placed)


def _name(sampler: SceneSampler, kind: str, templates: Sequence[str]) -> Example:
    scene = alone(sampler, (kind,))
    answer = scene.placed[0].sprite.name
    return Example((scene,), ((sampler.pick(templates), answer),), {"answer": answer, "media": [scene.facts()]})
