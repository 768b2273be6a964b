"""Questions about clips: what is shown, which way it moves, what comes first, when it is to be seen."""

from collections.abc import Sequence

from data_pipelines.synthetic.formats import span_answer
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scenes import Clip, Track
from data_pipelines.synthetic.studio import CELL, READABLE, Region, Studio
from data_pipelines.synthetic.things import Thing, make_thing
from data_pipelines.synthetic.vocabulary import COLOURS, DIRECTIONS

SHOWN = ("What is shown?", "What does the video show?", "Name what you see.")
APPEARS = ("What appears?", "What comes in?", "What is new?")
START = ("What is there from the start?", "What is there all the time?")
WAY = ("Which way does it move?", "In which direction does it move?", "Where does it go?")
FIRST = ("What appears first?", "What comes first?")
LAST = ("What appears last?", "What comes last?")
WHEN = ("When can you see the {name}?", "When is the {name} shown?", "Give the time of the {name}.")
STATIC_SIZES = ((56, 84), (84, 56), (84, 84))  # of at least six merge blocks, which are never resampled
_BLINK = 3  # pixels of a blinking light


def video_name(studio: Studio) -> Example:
    """One thing in a clip, still or wandering."""
    height, width = studio.clip_size()
    thing = _some_thing(studio, 0.5, 0.8, height, width)
    frames, region = studio.between(4, 6), (0, 0, width, height)
    corners = [_corner(studio, thing, region) for _ in range(frames)]
    if studio.chance(0.4):
        corners = corners[:1] * frames
    return _ask(studio, SHOWN, thing.name, studio.clip(height, width, frames, Track(thing, tuple(corners)), noisy=0.5))


def motion(studio: Studio) -> Example:
    """One thing crosses most of the picture."""
    way = studio.pick(tuple(DIRECTIONS))
    height, width = studio.clip_size()
    thing = _some_thing(studio, 0.3, 0.45, height, width)
    frames = studio.between(4, 6)
    free = (width - thing.width, height - thing.height)
    along = 0 if DIRECTIONS[way][0] else 1
    length = studio.between(0.65 * free[along], free[along])
    start = studio.between(0, free[along] - length)
    path = [start + round(length * frame / (frames - 1)) for frame in range(frames)]
    if sum(DIRECTIONS[way]) < 0:
        path.reverse()
    across = studio.between(0, free[1 - along])
    corners = tuple((at, across) if along == 0 else (across, at) for at in path)
    return _ask(studio, WAY, way, studio.clip(height, width, frames, Track(thing, corners)))


def order(studio: Studio) -> Example:
    """Two or three things appear one after the other, and stay or go."""
    count = studio.between(2, 3)
    height, width = studio.pick(((56, 84), (84, 56), (84, 84)))
    frames = studio.between(max(4, count + 1), 6)
    entries = sorted(studio.some(range(frames), count))
    stay = studio.chance(0.5)
    things, colours = studio.different(count), studio.colours(count)
    tracks = []
    for rank, region in enumerate(studio.cells(count, height, width)):
        thing = studio.thing(*things[rank], colours[rank], studio.between(READABLE, CELL - 1))
        stop = frames if stay or rank == count - 1 else entries[rank + 1]
        tracks.append(_track(thing, _corner(studio, thing, region), frames, (entries[rank], stop)))
    question, answer = (FIRST, things[0][1]) if studio.chance(0.5) else (LAST, things[-1][1])
    return _ask(studio, question, answer, studio.clip(height, width, frames, *studio.some(tracks, count)))


def when(studio: Studio) -> Example:
    """The seconds in which the only thing is to be seen."""
    height, width = studio.clip_size()
    frames = studio.between(5, 8)
    thing = _some_thing(studio, 0.4, 0.7, height, width)
    span = random_span(studio, frames)
    track = _track(thing, _corner(studio, thing, (0, 0, width, height)), frames, span)
    return _when(studio, studio.clip(height, width, frames, track), thing, span)


def when_of_two(studio: Studio) -> Example:
    """The same of the one of two that is named."""
    clip, spans = two_with_times(studio)
    rank = studio.between(0, 1)
    return _when(studio, clip, clip.tracks[rank].thing, spans[rank])


def talk_of_times(studio: Studio) -> Example:
    """When each of two things is to be seen, and which comes first."""
    clip, spans = two_with_times(studio)
    names = [track.thing.name for track in clip.tracks]
    turns = [(studio.pick(WHEN).format(name=name), span_answer(*span)) for name, span in zip(names, spans, strict=True)]
    if spans[0][0] != spans[1][0]:
        early = names[0] if spans[0][0] < spans[1][0] else names[1]
        turns.append((studio.pick(FIRST), early))
    turns = studio.some(turns, len(turns))
    return Example((clip,), tuple(turns), {"answer": turns[0][1], "media": [clip.facts()]})


def static(studio: Studio) -> Example:
    """Next to nothing changes: a light blinks, or a small thing appears and stays. At least half can be pruned."""
    height, width = studio.pick(STATIC_SIZES)
    frames = studio.between(5, 8)
    # The last blocks along the longer side are for what changes, the rest for what does not.
    across = width >= height
    rest = (0, 0, width - CELL, height) if across else (0, 0, width, height - CELL)
    room = min(rest[2], rest[3])
    (kind, name), (new_kind, new_name) = studio.different(2)
    colour, new_colour = studio.colours(2)
    thing = studio.thing(kind, name, colour, studio.between(0.55 * room, 0.9 * room))
    tracks = [_track(thing, _corner(studio, thing, rest), frames, (0, frames))]
    offset = studio.between(0, (height if across else width) // CELL - 1) * CELL
    x, y = (width - CELL, offset) if across else (offset, height - CELL)
    if studio.chance(0.5):
        new = studio.thing(new_kind, new_name, new_colour, studio.between(READABLE, CELL - 2))
        span = (studio.between(1, frames - 1), frames)
        tracks.append(_track(new, _corner(studio, new, (x, y, x + CELL, y + CELL)), frames, span))
        question, answer = (APPEARS, new_name) if studio.chance(0.6) else (START, name)
    else:
        question, answer = SHOWN, name
        if studio.chance(0.5):
            light = make_thing(studio.rng, studio.bank, "shape", "square", "white", _BLINK, varied=False)
            tracks.append(Track(light, tuple((x + CELL - 15, y + 3) if n % 2 else None for n in range(frames))))
    return _ask(studio, question, answer, studio.clip(height, width, frames, *tracks, noisy=0))


def two_with_times(studio: Studio) -> tuple[Clip, tuple[tuple[int, int], tuple[int, int]]]:
    """Two things side by side, each in its own seconds."""
    height, width = studio.pick(((56, 84), (84, 56), (84, 84), (56, 56)))
    frames = studio.between(5, 8)
    spans = random_span(studio, frames), random_span(studio, frames)
    tracks = []
    halves = studio.some(studio.halves(height, width), 2)
    named = zip(studio.different(2), studio.colours(2), strict=True)
    for ((kind, name), colour), region, span in zip(named, halves, spans, strict=True):
        room = min(region[2] - region[0], region[3] - region[1]) - 2
        thing = studio.thing(kind, name, colour, studio.between(0.75 * room, room))
        tracks.append(_track(thing, _corner(studio, thing, region), frames, span))
    return studio.clip(height, width, frames, *tracks), spans


def random_span(studio: Studio, frames: int) -> tuple[int, int]:
    """First second and the one behind the last; never the whole clip. Long and short ones are equally likely."""
    length = studio.between(1, frames - 1)
    start = studio.between(0, frames - length)
    return start, start + length


def _some_thing(studio: Studio, low: float, high: float, height: int, width: int) -> Thing:
    """Its longer side is this share of the shorter side of the picture."""
    kind, name = studio.kind_and_name()
    smaller = min(height, width)
    return studio.thing(kind, name, studio.pick(list(COLOURS)), studio.between(low * smaller, high * smaller))


def _corner(studio: Studio, thing: Thing, region: Region) -> tuple[int, int]:
    placed = studio.placed(thing, region)
    return placed.x, placed.y


def _track(thing: Thing, corner: tuple[int, int], frames: int, span: tuple[int, int]) -> Track:
    return Track(thing, tuple(corner if span[0] <= frame < span[1] else None for frame in range(frames)))


def _when(studio: Studio, clip: Clip, thing: Thing, span: tuple[int, int]) -> Example:
    answer = span_answer(*span)
    question = studio.pick(WHEN).format(name=thing.name)
    truth = {"answer": answer, "asked": thing.name, "span": [float(end) for end in span], "media": [clip.facts()]}
    return Example((clip,), ((question, answer),), truth)


def _ask(studio: Studio, templates: Sequence[str], answer: str, clip: Clip) -> Example:
    return Example((clip,), ((studio.pick(templates), answer),), {"answer": answer, "media": [clip.facts()]})
