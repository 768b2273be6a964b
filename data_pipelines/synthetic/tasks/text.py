"""Text alone: addition, and the language of the other tasks, with what is seen given in words.

A model without a pretrained language half learns here what questions ask for, how answers are written, to look up a
named thing, and to read the times before frames.
"""

import zlib

from data_pipelines.synthetic.formats import box_answer, position_phrase, span_answer
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import SceneSampler
from data_pipelines.synthetic.tasks import counting, grounding, naming, videos
from data_pipelines.synthetic.vocabulary import COLOURS, DIGITS, DIRECTIONS, POSITIONS, with_article
from vl3_jax.processing.chat_template import time_label

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


def addition(sampler: SceneSampler) -> Example:
    """Two numbers with a sum of at most 99; a pair asked in one split, in either order, is asked in no other."""
    while True:
        a, b = sampler.between(0, _LARGEST_SUM), sampler.between(0, _LARGEST_SUM)
        if a + b <= _LARGEST_SUM and split_of_sum(a, b) == sampler.split:
            return _text(sampler.pick(SUM).format(a=a, b=b), str(a + b))


def split_of_sum(a: int, b: int) -> str:
    """The split in which a + b and b + a are asked."""
    return _HELD_OUT.get(zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % _HASHES, "train")


def copy(sampler: SceneSampler) -> Example:
    """Digits, names, captions and other answers, to be said again."""
    form = sampler.between(0, 4)
    if form == 0:
        text = "".join(sampler.pick(DIGITS) for _ in range(sampler.between(1, 6)))
    elif form == 1:
        text = " and ".join(name for _, name in sampler.different(sampler.between(1, 3)))
    elif form == 2:
        ((_, name),) = sampler.different(1)
        text = f"{_phrase(sampler.pick(list(COLOURS)), name)} {position_phrase(sampler.pick(POSITIONS))}"
    elif form == 3:
        ((_, name),) = sampler.different(1)
        text = box_answer(name, _random_box(sampler))
    else:
        start = sampler.between(0, 8)
        text = span_answer(start, start + sampler.between(1, 4))
    return _text(sampler.pick(AGAIN).format(text=text), text)


def recall(sampler: SceneSampler) -> Example:
    """A scene in words and one question about it, of those that are asked about pictures."""
    count = sampler.between(1, 3)
    sprites, colours, places = sampler.different(count), sampler.colours(count), sampler.some(POSITIONS, count)
    told = " ".join(
        f"There is {_phrase(colour, name)} {position_phrase(place)}."
        for (_, name), colour, place in zip(sprites, colours, places, strict=True)
    )
    asked = sampler.between(0, count - 1)
    name, colour, place = sprites[asked][1], colours[asked], places[asked]
    options = [
        (sampler.pick(naming.COLOUR_OF).format(name=name), colour),
        (sampler.pick(grounding.WHICH).format(colour=colour), name),
        (f"Where is the {name}?", place),
        (sampler.pick(counting.COUNT), str(count)),
    ]
    if count == 1:
        options += [
            (sampler.pick(grounding.NAME), name),
            (sampler.pick(naming.COLOUR), colour),
            (sampler.pick(counting.PLACE), place),
            (sampler.pick(grounding.CAPTION), f"{_phrase(colour, name)} {position_phrase(place)}"),
        ]
    if count == 2:
        both = " and ".join(_phrase(own, other) for (_, other), own in zip(sprites, colours, strict=True))
        options.append((sampler.pick(grounding.CAPTION_BOTH), both))
    question, answer = sampler.pick(options)
    return _text(f"{told} {question}", answer)


def boxes(sampler: SceneSampler) -> Example:
    """One to three things with their boxes, one of which is asked for."""
    sprites = sampler.different(sampler.between(1, 3))
    own = [_random_box(sampler) for _ in sprites]
    told = " ".join(f"The {name} is at {','.join(map(str, box))}." for (_, name), box in zip(sprites, own, strict=True))
    asked = sampler.between(0, len(sprites) - 1)
    name = sprites[asked][1]
    return _text(f"{told} {sampler.pick(grounding.BOX).format(name=name)}", box_answer(name, own[asked]))


def times(sampler: SceneSampler) -> Example:
    """A clip in words, each frame behind its time as in a prompt, and a question about when or which way."""
    frames = sampler.between(4, 8)
    if sampler.chance(0.2):
        way = sampler.pick(tuple(DIRECTIONS))
        path = [_PATHS[way][min(3 * frame // frames, 2)] for frame in range(frames)]
        return _text(f"{_timed(path)} {sampler.pick(videos.WAY)}", way)
    (_, first), (_, second) = sampler.different(2)
    spans = videos.random_span(sampler, frames), videos.random_span(sampler, frames)
    shown = []
    for frame in range(frames):
        seen = [name for name, span in ((first, spans[0]), (second, spans[1])) if span[0] <= frame < span[1]]
        shown.append(" and ".join(seen) or "nothing")
    if spans[0][0] != spans[1][0] and sampler.chance(0.4):
        early, late = (first, second) if spans[0][0] < spans[1][0] else (second, first)
        question, answer = (videos.FIRST, early) if sampler.chance(0.5) else (videos.LAST, late)
        return _text(f"{_timed(shown)} {sampler.pick(question)}", answer)
    name, span = sampler.pick(((first, spans[0]), (second, spans[1])))
    return _text(f"{_timed(shown)} {sampler.pick(videos.WHEN).format(name=name)}", span_answer(*span))


def _timed(shown: list[str]) -> str:
    return ",".join(f"{time_label(frame)} {words}" for frame, words in enumerate(shown)) + "."


def _phrase(colour: str, name: str) -> str:
    return with_article(f"{colour} {name}")


def _random_box(sampler: SceneSampler) -> list[int]:
    (x0, x1), (y0, y1) = (sorted(sampler.rng.integers(0, 1001, 2).tolist()) for _ in range(2))
    return [x0, y0, x1, y1]


def _text(question: str, answer: str) -> Example:
    return Example((), ((question, answer),), {"answer": answer})
