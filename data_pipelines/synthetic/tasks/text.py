"""Tasks without media: addition, and the language of the other tasks, with the scene described in words.

They teach a language model trained from scratch the meaning of the questions, the formats of the answers, looking up a
named object, and reading the time labels of frames.
"""

import zlib

from data_pipelines.synthetic.formats import box_answer, object_phrase, position_phrase, span_answer
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import SceneSampler
from data_pipelines.synthetic.tasks import counting, grounding, naming, videos
from data_pipelines.synthetic.vocabulary import DIGITS, DIRECTIONS, POSITIONS
from vl3_jax.processing.chat_template import time_label

SUM = ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.")
AGAIN = ("Repeat: {text}", "Say this again: {text}", "Copy: {text}")
_LARGEST_SUM = 99
_HELD_OUT = {0: "test", 1: "dev"}  # split by hash bucket of a pair of numbers; other buckets are for training
_BUCKETS = 10
_POSITIONS_ALONG = {
    "left": ("right", "middle", "left"),
    "right": ("left", "middle", "right"),
    "up": ("bottom", "middle", "top"),
    "down": ("top", "middle", "bottom"),
}


def addition(sampler: SceneSampler) -> Example:
    """The sum of two numbers, at most 99. A pair of numbers, in either order, belongs to one split only."""
    while True:
        a, b = sampler.integer(0, _LARGEST_SUM), sampler.integer(0, _LARGEST_SUM)
        if a + b <= _LARGEST_SUM and split_of_sum(a, b) == sampler.split:
            return _text(sampler.choice(SUM).format(a=a, b=b), str(a + b))


def split_of_sum(a: int, b: int) -> str:
    """Returns the split to which a + b and b + a belong."""
    return _HELD_OUT.get(zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % _BUCKETS, "train")


def copy(sampler: SceneSampler) -> Example:
    """Digits, names, captions and other answers, to be repeated."""
    form = sampler.integer(0, 4)
    if form == 0:
        text = "".join(sampler.choice(DIGITS) for _ in range(sampler.integer(1, 6)))
    elif form == 1:
        text = " and ".join(name for _, name in sampler.distinct_names(sampler.integer(1, 3)))
    elif form == 2:
        _, name = sampler.kind_and_name()
        text = f"{object_phrase(sampler.colour(), name)} {position_phrase(sampler.choice(POSITIONS))}"
    elif form == 3:
        _, name = sampler.kind_and_name()
        text = box_answer(name, _random_box(sampler))
    else:
        start = sampler.integer(0, 8)
        text = span_answer(start, start + sampler.integer(1, 4))
    return _text(sampler.choice(AGAIN).format(text=text), text)


def recall(sampler: SceneSampler) -> Example:
    """A scene described in words, and one of the questions that are asked about images."""
    count = sampler.integer(1, 3)
    looks = sampler.distinct_looks(count)
    positions = sampler.sample(POSITIONS, count)
    objects = [object_phrase(colour, name) for _, name, colour in looks]
    captions = [f"{phrase} {position_phrase(position)}" for phrase, position in zip(objects, positions, strict=True)]
    description = " ".join(f"There is {caption}." for caption in captions)
    asked = sampler.integer(0, count - 1)
    (_, name, colour), position = looks[asked], positions[asked]
    options = [
        (sampler.choice(naming.COLOUR_OF).format(name=name), colour),
        (sampler.choice(grounding.WHICH).format(colour=colour), name),
        (f"Where is the {name}?", position),
        (sampler.choice(counting.COUNT), str(count)),
    ]
    if count == 1:
        options += [
            (sampler.choice(grounding.NAME), name),
            (sampler.choice(naming.COLOUR), colour),
            (sampler.choice(counting.POSITION), position),
            (sampler.choice(grounding.CAPTION), captions[0]),
        ]
    if count == 2:
        options.append((sampler.choice(grounding.CAPTION_BOTH), " and ".join(objects)))
    question, answer = sampler.choice(options)
    return _text(f"{description} {question}", answer)


def boxes(sampler: SceneSampler) -> Example:
    """One to three objects with their boxes, one of which is asked for."""
    boxes_by_name = {name: _random_box(sampler) for _, name in sampler.distinct_names(sampler.integer(1, 3))}
    description = " ".join(f"The {name} is at {','.join(map(str, box))}." for name, box in boxes_by_name.items())
    name, box = sampler.choice(list(boxes_by_name.items()))
    return _text(f"{description} {sampler.choice(grounding.BOX).format(name=name)}", box_answer(name, box))


def times(sampler: SceneSampler) -> Example:
    """A video in words, each frame after its time label as in a prompt, and a question about times or the direction."""
    num_frames = sampler.integer(4, 8)
    if sampler.bernoulli(0.2):
        direction = sampler.choice(tuple(DIRECTIONS))
        path = [_POSITIONS_ALONG[direction][min(3 * frame // num_frames, 2)] for frame in range(num_frames)]
        return _text(f"{_timed(path)} {sampler.choice(videos.DIRECTION)}", direction)
    spans = {name: videos.random_span(sampler, num_frames) for _, name in sampler.distinct_names(2)}
    captions = []
    for frame in range(num_frames):
        visible = [name for name, (start, stop) in spans.items() if start <= frame < stop]
        captions.append(" and ".join(visible) or "nothing")
    early, late = sorted(spans, key=lambda name: spans[name][0])
    if spans[early][0] < spans[late][0] and sampler.bernoulli(0.4):
        question, answer = (videos.FIRST, early) if sampler.bernoulli(0.5) else (videos.LAST, late)
        return _text(f"{_timed(captions)} {sampler.choice(question)}", answer)
    name, span = sampler.choice(list(spans.items()))
    return _text(f"{_timed(captions)} {sampler.choice(videos.WHEN).format(name=name)}", span_answer(*span))


def _timed(captions: list[str]) -> str:
    return ",".join(f"{time_label(frame)} {caption}" for frame, caption in enumerate(captions)) + "."


def _random_box(sampler: SceneSampler) -> list[int]:
    (x0, x1), (y0, y1) = (sorted(sampler.rng.integers(0, 1001, 2).tolist()) for _ in range(2))
    return [x0, y0, x1, y1]


def _text(question: str, answer: str) -> Example:
    return Example(turns=((question, answer),))
