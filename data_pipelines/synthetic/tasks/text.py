"""Text alone: addition, and the language of the other tasks, with what is seen given in words.

A model without a pretrained language half learns here what questions ask for, how answers are written, to look up a
named thing, and to read the times before frames.
"""

import zlib

from data_pipelines.synthetic.formats import box_answer, place_phrase, span_answer
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.studio import Studio
from data_pipelines.synthetic.tasks import clips, counting, grounding, naming
from data_pipelines.synthetic.vocabulary import COLOURS, DIGITS, DIRECTIONS, PLACES, with_article
from vl3_jax.processing.chat import time_label

SUM = ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.")
AGAIN = ("Repeat: {text}", "Say this again: {text}", "Copy: {text}")
_LARGEST_SUM = 99
_HELD_OUT = {0: "test", 1: "dev"}  # pairs of numbers by their hash; the others are for training
_HASHES = 10
_PATHS = {
    "left": ("right", "middle", "left"),
    "right": ("left", "middle", "right"),
    "up": ("bottom", "middle", "top"),
    "down": ("top", "middle", "bottom"),
}


def addition(studio: Studio) -> Example:
    """Two numbers with a sum of at most 99; a pair asked in one split, in either order, is asked in no other."""
    while True:
        a, b = studio.between(0, _LARGEST_SUM), studio.between(0, _LARGEST_SUM)
        if a + b <= _LARGEST_SUM and split_of_sum(a, b) == studio.split:
            return _text(studio.pick(SUM).format(a=a, b=b), str(a + b))


def split_of_sum(a: int, b: int) -> str:
    """The split in which a + b and b + a are asked."""
    return _HELD_OUT.get(zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % _HASHES, "train")


def copy(studio: Studio) -> Example:
    """Digits, names, captions and other answers, to be said again."""
    form = studio.between(0, 4)
    if form == 0:
        text = "".join(studio.pick(DIGITS) for _ in range(studio.between(1, 6)))
    elif form == 1:
        text = " and ".join(name for _, name in studio.different(studio.between(1, 3)))
    elif form == 2:
        ((_, name),) = studio.different(1)
        text = f"{_phrase(studio.pick(list(COLOURS)), name)} {place_phrase(studio.pick(PLACES))}"
    elif form == 3:
        ((_, name),) = studio.different(1)
        text = box_answer(name, _random_box(studio))
    else:
        start = studio.between(0, 8)
        text = span_answer(start, start + studio.between(1, 4))
    return _text(studio.pick(AGAIN).format(text=text), text)


def recall(studio: Studio) -> Example:
    """A scene in words and one question about it, of those that are asked about pictures."""
    count = studio.between(1, 3)
    things, colours, places = studio.different(count), studio.colours(count), studio.some(PLACES, count)
    told = " ".join(
        f"There is {_phrase(colour, name)} {place_phrase(place)}."
        for (_, name), colour, place in zip(things, colours, places, strict=True)
    )
    asked = studio.between(0, count - 1)
    name, colour, place = things[asked][1], colours[asked], places[asked]
    options = [
        (studio.pick(naming.COLOUR_OF).format(name=name), colour),
        (studio.pick(grounding.WHICH).format(colour=colour), name),
        (f"Where is the {name}?", place),
        (studio.pick(counting.COUNT), str(count)),
    ]
    if count == 1:
        options += [
            (studio.pick(grounding.NAME), name),
            (studio.pick(naming.COLOUR), colour),
            (studio.pick(counting.PLACE), place),
            (studio.pick(grounding.CAPTION), f"{_phrase(colour, name)} {place_phrase(place)}"),
        ]
    if count == 2:
        both = " and ".join(_phrase(own, other) for (_, other), own in zip(things, colours, strict=True))
        options.append((studio.pick(grounding.CAPTION_BOTH), both))
    question, answer = studio.pick(options)
    return _text(f"{told} {question}", answer)


def boxes(studio: Studio) -> Example:
    """One to three things with their boxes, one of which is asked for."""
    things = studio.different(studio.between(1, 3))
    own = [_random_box(studio) for _ in things]
    told = " ".join(f"The {name} is at {','.join(map(str, box))}." for (_, name), box in zip(things, own, strict=True))
    asked = studio.between(0, len(things) - 1)
    name = things[asked][1]
    return _text(f"{told} {studio.pick(grounding.BOX).format(name=name)}", box_answer(name, own[asked]))


def times(studio: Studio) -> Example:
    """A clip in words, each frame behind its time as in a prompt, and a question about when or which way."""
    frames = studio.between(4, 8)
    if studio.chance(0.2):
        way = studio.pick(tuple(DIRECTIONS))
        path = [_PATHS[way][min(3 * frame // frames, 2)] for frame in range(frames)]
        return _text(f"{_timed(path)} {studio.pick(clips.WAY)}", way)
    (_, first), (_, second) = studio.different(2)
    spans = clips.random_span(studio, frames), clips.random_span(studio, frames)
    shown = []
    for frame in range(frames):
        seen = [name for name, span in ((first, spans[0]), (second, spans[1])) if span[0] <= frame < span[1]]
        shown.append(" and ".join(seen) or "nothing")
    if spans[0][0] != spans[1][0] and studio.chance(0.4):
        early, late = (first, second) if spans[0][0] < spans[1][0] else (second, first)
        question, answer = (clips.FIRST, early) if studio.chance(0.5) else (clips.LAST, late)
        return _text(f"{_timed(shown)} {studio.pick(question)}", answer)
    name, span = studio.pick(((first, spans[0]), (second, spans[1])))
    return _text(f"{_timed(shown)} {studio.pick(clips.WHEN).format(name=name)}", span_answer(*span))


def _timed(shown: list[str]) -> str:
    return ",".join(f"{time_label(frame)} {words}" for frame, words in enumerate(shown)) + "."


def _phrase(colour: str, name: str) -> str:
    return with_article(f"{colour} {name}")


def _random_box(studio: Studio) -> list[int]:
    (x0, x1), (y0, y1) = (sorted(studio.rng.integers(0, 1001, 2).tolist()) for _ in range(2))
    return [x0, y0, x1, y1]


def _text(question: str, answer: str) -> Example:
    return Example((), ((question, answer),), {"answer": answer})
