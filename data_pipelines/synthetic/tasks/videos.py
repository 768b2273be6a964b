"""Questions about clips: what is shown, which way it moves, what comes first, when it is to be seen."""

from collections.abc import Sequence

from data_pipelines.synthetic.formats import span_answer
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import CELL, READABLE, Region, SceneSampler
from data_pipelines.synthetic.scenes import SyntheticVideo, Track
from data_pipelines.synthetic.sprites import Sprite, make_sprite
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


def video_name(sampler: SceneSampler) -> Example:
    """One thing in a clip, still or wandering."""
    height, width = sampler.clip_size()
    sprite = _some_thing(sampler, 0.5, 0.8, height, width)
    frames, region = sampler.between(4, 6), (0, 0, width, height)
    corners = [_corner(sampler, sprite, region) for _ in range(frames)]
    if sampler.chance(0.4):
        corners = corners[:1] * frames
    return _ask(
        sampler, SHOWN, sprite.name, sampler.clip(height, width, frames, Track(sprite, tuple(corners)), noisy=0.5)
    )


def motion(sampler: SceneSampler) -> Example:
    """One thing crosses most of the picture."""
    way = sampler.pick(tuple(DIRECTIONS))
    height, width = sampler.clip_size()
    sprite = _some_thing(sampler, 0.3, 0.45, height, width)
    frames = sampler.between(4, 6)
    free = (width - sprite.width, height - sprite.height)
    along = 0 if DIRECTIONS[way][0] else 1
    length = sampler.between(0.65 * free[along], free[along])
    start = sampler.between(0, free[along] - length)
    path = [start + round(length * frame / (frames - 1)) for frame in range(frames)]
    if sum(DIRECTIONS[way]) < 0:
        path.reverse()
    across = sampler.between(0, free[1 - along])
    corners = tuple((at, across) if along == 0 else (across, at) for at in path)
    return _ask(sampler, WAY, way, sampler.clip(height, width, frames, Track(sprite, corners)))


def order(sampler: SceneSampler) -> Example:
    """Two or three things appear one after the other, and stay or go."""
    count = sampler.between(2, 3)
    height, width = sampler.pick(((56, 84), (84, 56), (84, 84)))
    frames = sampler.between(max(4, count + 1), 6)
    specs = sorted(sampler.some(range(frames), count))
    stay = sampler.chance(0.5)
    sprites, colours = sampler.different(count), sampler.colours(count)
    tracks = []
    for rank, region in enumerate(sampler.cells(count, height, width)):
        sprite = sampler.sprite(*sprites[rank], colours[rank], sampler.between(READABLE, CELL - 1))
        stop = frames if stay or rank == count - 1 else specs[rank + 1]
        tracks.append(_track(sprite, _corner(sampler, sprite, region), frames, (specs[rank], stop)))
    question, answer = (FIRST, sprites[0][1]) if sampler.chance(0.5) else (LAST, sprites[-1][1])
    return _ask(sampler, question, answer, sampler.clip(height, width, frames, *sampler.some(tracks, count)))


def when(sampler: SceneSampler) -> Example:
    """The seconds in which the only thing is to be seen."""
    height, width = sampler.clip_size()
    frames = sampler.between(5, 8)
    sprite = _some_thing(sampler, 0.4, 0.7, height, width)
    span = random_span(sampler, frames)
    track = _track(sprite, _corner(sampler, sprite, (0, 0, width, height)), frames, span)
    return _when(sampler, sampler.clip(height, width, frames, track), sprite, span)


def when_of_two(sampler: SceneSampler) -> Example:
    """The same of the one of two that is named."""
    clip, spans = two_with_times(sampler)
    rank = sampler.between(0, 1)
    return _when(sampler, clip, clip.tracks[rank].sprite, spans[rank])


def talk_of_times(sampler: SceneSampler) -> Example:
    """When each of two things is to be seen, and which comes first."""
    clip, spans = two_with_times(sampler)
    names = [track.sprite.name for track in clip.tracks]
    turns = [
        (sampler.pick(WHEN).format(name=name), span_answer(*span)) for name, span in zip(names, spans, strict=True)
    ]
    if spans[0][0] != spans[1][0]:
        early = names[0] if spans[0][0] < spans[1][0] else names[1]
        turns.append((sampler.pick(FIRST), early))
    turns = sampler.some(turns, len(turns))
    return Example((clip,), tuple(turns), {"answer": turns[0][1], "media": [clip.facts()]})


def static(sampler: SceneSampler) -> Example:
    """Next to nothing changes: a light blinks, or a small thing appears and stays. At least half can be pruned."""
    height, width = sampler.pick(STATIC_SIZES)
    frames = sampler.between(5, 8)
    # The last blocks along the longer side are for what changes, the rest for what does not.
    across = width >= height
    rest = (0, 0, width - CELL, height) if across else (0, 0, width, height - CELL)
    room = min(rest[2], rest[3])
    (kind, name), (new_kind, new_name) = sampler.different(2)
    colour, new_colour = sampler.colours(2)
    sprite = sampler.sprite(kind, name, colour, sampler.between(0.55 * room, 0.9 * room))
    tracks = [_track(sprite, _corner(sampler, sprite, rest), frames, (0, frames))]
    offset = sampler.between(0, (height if across else width) // CELL - 1) * CELL
    x, y = (width - CELL, offset) if across else (offset, height - CELL)
    if sampler.chance(0.5):
        new = sampler.sprite(new_kind, new_name, new_colour, sampler.between(READABLE, CELL - 2))
        span = (sampler.between(1, frames - 1), frames)
        tracks.append(_track(new, _corner(sampler, new, (x, y, x + CELL, y + CELL)), frames, span))
        question, answer = (APPEARS, new_name) if sampler.chance(0.6) else (START, name)
    else:
        question, answer = SHOWN, name
        if sampler.chance(0.5):
            light = make_sprite(sampler.rng, sampler.image_pool, "shape", "square", "white", _BLINK, varied=False)
            tracks.append(Track(light, tuple((x + CELL - 15, y + 3) if n % 2 else None for n in range(frames))))
    return _ask(sampler, question, answer, sampler.clip(height, width, frames, *tracks, noisy=0))


def two_with_times(sampler: SceneSampler) -> tuple[SyntheticVideo, tuple[tuple[int, int], tuple[int, int]]]:
    """Two things side by side, each in its own seconds."""
    height, width = sampler.pick(((56, 84), (84, 56), (84, 84), (56, 56)))
    frames = sampler.between(5, 8)
    spans = random_span(sampler, frames), random_span(sampler, frames)
    tracks = []
    halves = sampler.some(sampler.halves(height, width), 2)
    named = zip(sampler.different(2), sampler.colours(2), strict=True)
    for ((kind, name), colour), region, span in zip(named, halves, spans, strict=True):
        room = min(region[2] - region[0], region[3] - region[1]) - 2
        sprite = sampler.sprite(kind, name, colour, sampler.between(0.75 * room, room))
        tracks.append(_track(sprite, _corner(sampler, sprite, region), frames, span))
    return sampler.clip(height, width, frames, *tracks), spans


def random_span(sampler: SceneSampler, frames: int) -> tuple[int, int]:
    """First second and the one behind the last; never the whole clip. Long and short ones are equally likely."""
    length = sampler.between(1, frames - 1)
    start = sampler.between(0, frames - length)
    return start, start + length


def _some_thing(sampler: SceneSampler, low: float, high: float, height: int, width: int) -> Sprite:
    """Its longer side is this share of the shorter side of the picture."""
    kind, name = sampler.kind_and_name()
    smaller = min(height, width)
    return sampler.sprite(kind, name, sampler.pick(list(COLOURS)), sampler.between(low * smaller, high * smaller))


def _corner(sampler: SceneSampler, sprite: Sprite, region: Region) -> tuple[int, int]:
    placed = sampler.placed(sprite, region)
    return placed.x, placed.y


def _track(sprite: Sprite, corner: tuple[int, int], frames: int, span: tuple[int, int]) -> Track:
    return Track(sprite, tuple(corner if span[0] <= frame < span[1] else None for frame in range(frames)))


def _when(sampler: SceneSampler, clip: SyntheticVideo, sprite: Sprite, span: tuple[int, int]) -> Example:
    answer = span_answer(*span)
    question = sampler.pick(WHEN).format(name=sprite.name)
    truth = {"answer": answer, "asked": sprite.name, "span": [float(end) for end in span], "media": [clip.facts()]}
    return Example((clip,), ((question, answer),), truth)


def _ask(sampler: SceneSampler, templates: Sequence[str], answer: str, clip: SyntheticVideo) -> Example:
    return Example((clip,), ((sampler.pick(templates), answer),), {"answer": answer, "media": [clip.facts()]})
