"""Boxes of things that the question names, and captions that tell what is where."""

from data_pipelines.synthetic.formats import (
    BOX_FORMAT,
    box_answer,
    place_of,
    place_phrase,
    thing_phrase,
    thousandths,
)
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scenes import Placed, Still
from data_pipelines.synthetic.studio import Studio
from data_pipelines.synthetic.tasks.counting import PLACE, in_a_ninth
from data_pipelines.synthetic.tasks.naming import COLOUR, COLOUR_OF, alone, several
from data_pipelines.synthetic.vocabulary import KINDS

BOX = (f"Locate the {{name}}. {BOX_FORMAT}", f"Find the {{name}}. {BOX_FORMAT}", "Give the box of the {name}.")
CAPTION = ("Describe the picture.", "Write a caption.", "Describe what you see.")
CAPTION_BOTH = ("Describe both things.", "Write a caption for both things.", "Describe the two things.")
NAME = ("What is it?", "What is this?", "Name it.")
WHICH = ("What is {colour}?", "Which thing is {colour}?", "Name the {colour} thing.")


def box(studio: Studio) -> Example:
    """The box of the only thing."""
    still = alone(studio, KINDS, shares=(0.4, 0.8))
    return _box(studio, still, still.placed[0])


def box_of_two(studio: Studio) -> Example:
    """The box of the one of two that is named."""
    still = several(studio, 2)
    return _box(studio, still, studio.pick(still.placed))


def caption(studio: Studio) -> Example:
    """Colour, name and place of the only thing."""
    placed, height, width = in_a_ninth(studio)
    still = studio.still(height, width, placed)
    answer = f"{thing_phrase(placed.thing)} {place_phrase(place_of(placed.box, height, width))}"
    return Example((still,), ((studio.pick(CAPTION), answer),), {"answer": answer, "media": [still.facts()]})


def caption_of_two(studio: Studio) -> Example:
    """Colours and names of two things, left before right or top before bottom."""
    still = several(studio, 2)
    answer = " and ".join(thing_phrase(one.thing) for one in still.placed)
    return Example((still,), ((studio.pick(CAPTION_BOTH), answer),), {"answer": answer, "media": [still.facts()]})


def talk(studio: Studio) -> Example:
    """Several questions about one thing: far more to learn from each picture."""
    placed, height, width = in_a_ninth(studio)
    still = studio.still(height, width, placed)
    thing = placed.thing
    turns = [
        (studio.pick(NAME), thing.name),
        (studio.pick(COLOUR), thing.colour),
        (studio.pick(PLACE), place_of(placed.box, height, width)),
        _box_turn(studio, still, placed),
    ]
    turns = studio.some(turns, 3)
    return Example((still,), tuple(turns), {"answer": turns[0][1], "media": [still.facts()]})


def talk_of_two(studio: Studio) -> Example:
    """The same question about each of two things, so that only the named one's own look tells the answer."""
    still = several(studio, 2)
    first, second = studio.some(still.placed, 2)
    turns = []
    for one in (first, second):
        turns += [
            (studio.pick(COLOUR_OF).format(name=one.thing.name), one.thing.colour),
            (studio.pick(WHICH).format(colour=one.thing.colour), one.thing.name),
            _box_turn(studio, still, one),
        ]
    turns = studio.some(turns, 4)
    return Example((still,), tuple(turns), {"answer": turns[0][1], "media": [still.facts()]})


def _box(studio: Studio, still: Still, placed: Placed) -> Example:
    turn = _box_turn(studio, still, placed)
    inside = thousandths(placed.box, still.height, still.width)
    truth = {"answer": turn[1], "asked": placed.thing.name, "box": inside, "media": [still.facts()]}
    return Example((still,), (turn,), truth)


def _box_turn(studio: Studio, still: Still, placed: Placed) -> tuple[str, str]:
    question = studio.pick(BOX).format(name=placed.thing.name)
    return question, box_answer(placed.thing.name, thousandths(placed.box, still.height, still.width))
