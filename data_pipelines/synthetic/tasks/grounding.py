"""Bounding boxes of named objects, captions, and conversations about one or two objects."""

from data_pipelines.synthetic.formats import (
    BOX_FORMAT,
    box_answer,
    object_phrase,
    position_of,
    position_phrase,
    thousandths,
)
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import SceneSampler
from data_pipelines.synthetic.scenes import PlacedObject, Scene
from data_pipelines.synthetic.tasks.counting import POSITION, object_in_cell
from data_pipelines.synthetic.tasks.naming import COLOUR, COLOUR_OF, alone, several
from data_pipelines.synthetic.vocabulary import KINDS

BOX = (f"Locate the {{name}}. {BOX_FORMAT}", f"Find the {{name}}. {BOX_FORMAT}", "Give the box of the {name}.")
CAPTION = ("Describe the picture.", "Write a caption.", "Describe what you see.")
CAPTION_BOTH = ("Describe both things.", "Write a caption for both things.", "Describe the two things.")
NAME = ("What is it?", "What is this?", "Name it.")
WHICH = ("What is {colour}?", "Which thing is {colour}?", "Name the {colour} thing.")


def box(sampler: SceneSampler) -> Example:
    """The box of the only object."""
    scene = alone(sampler, KINDS, shares=(0.4, 0.8))
    return _box(sampler, scene, scene.objects[0])


def box_of_two(sampler: SceneSampler) -> Example:
    """The box of the named one of two objects."""
    scene = several(sampler, 2)
    return _box(sampler, scene, sampler.choice(scene.objects))


def caption(sampler: SceneSampler) -> Example:
    """Colour, name and position of the only object."""
    scene = object_in_cell(sampler)
    (placed,) = scene.objects
    position = position_phrase(position_of(placed.box, scene.height, scene.width))
    answer = f"{object_phrase(placed.sprite.colour, placed.sprite.name)} {position}"
    return Example((scene,), ((sampler.choice(CAPTION), answer),))


def caption_of_two(sampler: SceneSampler) -> Example:
    """Colours and names of two objects, left before right or top before bottom."""
    scene = several(sampler, 2)
    answer = " and ".join(object_phrase(placed.sprite.colour, placed.sprite.name) for placed in scene.objects)
    return Example((scene,), ((sampler.choice(CAPTION_BOTH), answer),))


def talk(sampler: SceneSampler) -> Example:
    """Several questions about one object, which give far more supervision per image."""
    scene = object_in_cell(sampler)
    (placed,) = scene.objects
    turns = [
        (sampler.choice(NAME), placed.sprite.name),
        (sampler.choice(COLOUR), placed.sprite.colour),
        (sampler.choice(POSITION), position_of(placed.box, scene.height, scene.width)),
        _box_turn(sampler, scene, placed),
    ]
    return Example((scene,), tuple(sampler.sample(turns, 3)))


def talk_of_two(sampler: SceneSampler) -> Example:
    """The same questions about each of two objects, so that each answer depends on the object that is named."""
    scene = several(sampler, 2)
    turns = []
    for placed in sampler.sample(scene.objects, 2):
        turns += [
            (sampler.choice(COLOUR_OF).format(name=placed.sprite.name), placed.sprite.colour),
            (sampler.choice(WHICH).format(colour=placed.sprite.colour), placed.sprite.name),
            _box_turn(sampler, scene, placed),
        ]
    return Example((scene,), tuple(sampler.sample(turns, 4)))


def _box(sampler: SceneSampler, scene: Scene, placed: PlacedObject) -> Example:
    details = {"asked": placed.sprite.name, "box": thousandths(placed.box, scene.height, scene.width)}
    return Example((scene,), (_box_turn(sampler, scene, placed),), details)


def _box_turn(sampler: SceneSampler, scene: Scene, placed: PlacedObject) -> tuple[str, str]:
    question = sampler.choice(BOX).format(name=placed.sprite.name)
    return question, box_answer(placed.sprite.name, thousandths(placed.box, scene.height, scene.width))
