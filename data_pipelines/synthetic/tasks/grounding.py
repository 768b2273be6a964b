"""Boxes of things that the question names, and captions that tell what is where."""

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
from data_pipelines.synthetic.tasks.counting import PLACE, in_a_ninth
from data_pipelines.synthetic.tasks.naming import COLOUR, COLOUR_OF, alone, several
from data_pipelines.synthetic.vocabulary import KINDS

BOX = (f"Locate the {{name}}. {BOX_FORMAT}", f"Find the {{name}}. {BOX_FORMAT}", "Give the box of the {name}.")
CAPTION = ("Describe the picture.", "Write a caption.", "Describe what you see.")
CAPTION_BOTH = ("Describe both things.", "Write a caption for both things.", "Describe the two things.")
NAME = ("What is it?", "What is this?", "Name it.")
WHICH = ("What is {colour}?", "Which thing is {colour}?", "Name the {colour} thing.")


def box(sampler: SceneSampler) -> Example:
    """The box of the only thing."""
    scene = alone(sampler, KINDS, shares=(0.4, 0.8))
    return _box(sampler, scene, scene.placed[0])


def box_of_two(sampler: SceneSampler) -> Example:
    """The box of the one of two that is named."""
    scene = several(sampler, 2)
    return _box(sampler, scene, sampler.pick(scene.placed))


def caption(sampler: SceneSampler) -> Example:
    """Colour, name and place of the only thing."""
    placed, height, width = in_a_ninth(sampler)
    scene = sampler.scene(height, width, placed)
    answer = f"{object_phrase(placed.sprite)} {position_phrase(position_of(placed.box, height, width))}"
    return Example((scene,), ((sampler.pick(CAPTION), answer),), {"answer": answer, "media": [scene.facts()]})


def caption_of_two(sampler: SceneSampler) -> Example:
    """Colours and names of two things, left before right or top before bottom."""
    scene = several(sampler, 2)
    answer = " and ".join(object_phrase(one.sprite) for one in scene.placed)
    return Example((scene,), ((sampler.pick(CAPTION_BOTH), answer),), {"answer": answer, "media": [scene.facts()]})


def talk(sampler: SceneSampler) -> Example:
    """Several questions about one thing: far more to learn from each picture."""
    placed, height, width = in_a_ninth(sampler)
    scene = sampler.scene(height, width, placed)
    sprite = placed.sprite
    turns = [
        (sampler.pick(NAME), sprite.name),
        (sampler.pick(COLOUR), sprite.colour),
        (sampler.pick(PLACE), position_of(placed.box, height, width)),
        _box_turn(sampler, scene, placed),
    ]
    turns = sampler.some(turns, 3)
    return Example((scene,), tuple(turns), {"answer": turns[0][1], "media": [scene.facts()]})


def talk_of_two(sampler: SceneSampler) -> Example:
    """The same question about each of two things, so that only the named one's own look tells the answer."""
    scene = several(sampler, 2)
    first, second = sampler.some(scene.placed, 2)
    turns = []
    for one in (first, second):
        turns += [
            (sampler.pick(COLOUR_OF).format(name=one.sprite.name), one.sprite.colour),
            (sampler.pick(WHICH).format(colour=one.sprite.colour), one.sprite.name),
            _box_turn(sampler, scene, one),
        ]
    turns = sampler.some(turns, 4)
    return Example((scene,), tuple(turns), {"answer": turns[0][1], "media": [scene.facts()]})


def _box(sampler: SceneSampler, scene: Scene, placed: PlacedObject) -> Example:
    turn = _box_turn(sampler, scene, placed)
    inside = thousandths(placed.box, scene.height, scene.width)
    truth = {"answer": turn[1], "asked": placed.sprite.name, "box": inside, "media": [scene.facts()]}
    return Example((scene,), (turn,), truth)


def _box_turn(sampler: SceneSampler, scene: Scene, placed: PlacedObject) -> tuple[str, str]:
    question = sampler.pick(BOX).format(name=placed.sprite.name)
    return question, box_answer(placed.sprite.name, thousandths(placed.box, scene.height, scene.width))
