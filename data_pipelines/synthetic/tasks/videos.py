"""Questions about videos: their content, the direction of motion, the order of events, and when objects are visible."""

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
DIRECTION = ("Which way does it move?", "In which direction does it move?", "Where does it go?")
FIRST = ("What appears first?", "What comes first?")
LAST = ("What appears last?", "What comes last?")
WHEN = ("When can you see the {name}?", "When is the {name} shown?", "Give the time of the {name}.")
STATIC_SIZES = ((56, 84), (84, 56), (84, 84))  # at least six merge blocks, and never resampled
_BLINK = 3  # side of a blinking light in pixels


def video_name(sampler: SceneSampler) -> Example:
    """The name of the only object, which stands still or jumps about."""
    height, width = sampler.video_size()
    sprite = _random_sprite(sampler, 0.5, 0.8, height, width)
    num_frames, region = sampler.integer(4, 6), (0, 0, width, height)
    corners = [_corner(sampler, sprite, region) for _ in range(num_frames)]
    if sampler.bernoulli(0.4):
        corners = corners[:1] * num_frames
    video = sampler.video(height, width, num_frames, Track(sprite, tuple(corners)), noise_probability=0.5)
    return _example(sampler, SHOWN, sprite.name, video)


def motion(sampler: SceneSampler) -> Example:
    """The direction in which the only object crosses most of the image."""
    direction = sampler.choice(tuple(DIRECTIONS))
    height, width = sampler.video_size()
    sprite = _random_sprite(sampler, 0.3, 0.45, height, width)
    num_frames = sampler.integer(4, 6)
    free = (width - sprite.width, height - sprite.height)
    along = 0 if DIRECTIONS[direction][0] else 1
    length = sampler.integer(0.65 * free[along], free[along])
    start = sampler.integer(0, free[along] - length)
    path = [start + round(length * frame / (num_frames - 1)) for frame in range(num_frames)]
    if sum(DIRECTIONS[direction]) < 0:
        path.reverse()
    across = sampler.integer(0, free[1 - along])
    corners = tuple((offset, across) if along == 0 else (across, offset) for offset in path)
    return _example(sampler, DIRECTION, direction, sampler.video(height, width, num_frames, Track(sprite, corners)))


def order(sampler: SceneSampler) -> Example:
    """Which of two or three objects appears first or last."""
    count = sampler.integer(2, 3)
    height, width = sampler.choice(((56, 84), (84, 56), (84, 84)))
    num_frames = sampler.integer(max(4, count + 1), 6)
    starts = sorted(sampler.sample(range(num_frames), count))
    stay = sampler.bernoulli(0.5)
    objects, colours = sampler.distinct_names(count), sampler.distinct_colours(count)
    tracks = []
    for rank, region in enumerate(sampler.cells(count, height, width)):
        sprite = sampler.sprite(*objects[rank], colours[rank], sampler.integer(READABLE, CELL - 1))
        stop = num_frames if stay or rank == count - 1 else starts[rank + 1]
        tracks.append(_track(sprite, _corner(sampler, sprite, region), num_frames, (starts[rank], stop)))
    question, answer = (FIRST, objects[0][1]) if sampler.bernoulli(0.5) else (LAST, objects[-1][1])
    return _example(sampler, question, answer, sampler.video(height, width, num_frames, *sampler.sample(tracks, count)))


def when(sampler: SceneSampler) -> Example:
    """The seconds in which the only object is visible."""
    height, width = sampler.video_size()
    num_frames = sampler.integer(5, 8)
    sprite = _random_sprite(sampler, 0.4, 0.7, height, width)
    span = random_span(sampler, num_frames)
    track = _track(sprite, _corner(sampler, sprite, (0, 0, width, height)), num_frames, span)
    return _span_example(sampler, sampler.video(height, width, num_frames, track), sprite, span)


def when_of_two(sampler: SceneSampler) -> Example:
    """The seconds in which the named one of two objects is visible."""
    video, spans = two_timed_objects(sampler)
    rank = sampler.integer(0, 1)
    return _span_example(sampler, video, video.tracks[rank].sprite, spans[rank])


def talk_of_times(sampler: SceneSampler) -> Example:
    """When each of two objects is visible, and which appears first."""
    video, spans = two_timed_objects(sampler)
    names = [track.sprite.name for track in video.tracks]
    turns = [
        (sampler.choice(WHEN).format(name=name), span_answer(*span)) for name, span in zip(names, spans, strict=True)
    ]
    if spans[0][0] != spans[1][0]:
        early = names[0] if spans[0][0] < spans[1][0] else names[1]
        turns.append((sampler.choice(FIRST), early))
    turns = sampler.sample(turns, len(turns))
    return Example((video,), tuple(turns), {"answer": turns[0][1], "media": [video.facts()]})


def static(sampler: SceneSampler) -> Example:
    """An almost static video: a light blinks or a small object appears. At least half of the tokens can be pruned."""
    height, width = sampler.choice(STATIC_SIZES)
    num_frames = sampler.integer(5, 8)
    # Changes are confined to the last merge blocks along the longer side.
    across = width >= height
    static_region = (0, 0, width - CELL, height) if across else (0, 0, width, height - CELL)
    available = min(static_region[2], static_region[3])
    (kind, name), (new_kind, new_name) = sampler.distinct_names(2)
    colour, new_colour = sampler.distinct_colours(2)
    sprite = sampler.sprite(kind, name, colour, sampler.integer(0.55 * available, 0.9 * available))
    tracks = [_track(sprite, _corner(sampler, sprite, static_region), num_frames, (0, num_frames))]
    offset = sampler.integer(0, (height if across else width) // CELL - 1) * CELL
    x, y = (width - CELL, offset) if across else (offset, height - CELL)
    if sampler.bernoulli(0.5):
        new_sprite = sampler.sprite(new_kind, new_name, new_colour, sampler.integer(READABLE, CELL - 2))
        span = (sampler.integer(1, num_frames - 1), num_frames)
        corner = _corner(sampler, new_sprite, (x, y, x + CELL, y + CELL))
        tracks.append(_track(new_sprite, corner, num_frames, span))
        question, answer = (APPEARS, new_name) if sampler.bernoulli(0.6) else (START, name)
    else:
        question, answer = SHOWN, name
        if sampler.bernoulli(0.5):
            light = make_sprite(sampler.rng, sampler.image_pool, "shape", "square", "white", _BLINK, augment=False)
            tracks.append(Track(light, tuple((x + CELL - 15, y + 3) if n % 2 else None for n in range(num_frames))))
    return _example(sampler, question, answer, sampler.video(height, width, num_frames, *tracks, noise_probability=0))


def two_timed_objects(sampler: SceneSampler) -> tuple[SyntheticVideo, tuple[tuple[int, int], tuple[int, int]]]:
    """Makes a video of two objects side by side; returns it and the span of frames of each object."""
    height, width = sampler.choice(((56, 84), (84, 56), (84, 84), (56, 56)))
    num_frames = sampler.integer(5, 8)
    spans = random_span(sampler, num_frames), random_span(sampler, num_frames)
    tracks = []
    halves = sampler.sample(sampler.halves(height, width), 2)
    names_and_colours = zip(sampler.distinct_names(2), sampler.distinct_colours(2), strict=True)
    for ((kind, name), colour), region, span in zip(names_and_colours, halves, spans, strict=True):
        available = min(region[2] - region[0], region[3] - region[1]) - 2
        sprite = sampler.sprite(kind, name, colour, sampler.integer(0.75 * available, available))
        tracks.append(_track(sprite, _corner(sampler, sprite, region), num_frames, span))
    return sampler.video(height, width, num_frames, *tracks), spans


def random_span(sampler: SceneSampler, num_frames: int) -> tuple[int, int]:
    """Returns a random span [start, stop) of frames shorter than the video; all lengths are equally likely."""
    length = sampler.integer(1, num_frames - 1)
    start = sampler.integer(0, num_frames - length)
    return start, start + length


def _random_sprite(sampler: SceneSampler, low: float, high: float, height: int, width: int) -> Sprite:
    """Makes a random object whose longer side is a share from `low` to `high` of the image's shorter side."""
    kind, name = sampler.kind_and_name()
    smaller = min(height, width)
    return sampler.sprite(kind, name, sampler.choice(list(COLOURS)), sampler.integer(low * smaller, high * smaller))


def _corner(sampler: SceneSampler, sprite: Sprite, region: Region) -> tuple[int, int]:
    placed = sampler.place_object(sprite, region)
    return placed.x, placed.y


def _track(sprite: Sprite, corner: tuple[int, int], num_frames: int, span: tuple[int, int]) -> Track:
    return Track(sprite, tuple(corner if span[0] <= frame < span[1] else None for frame in range(num_frames)))


def _span_example(sampler: SceneSampler, video: SyntheticVideo, sprite: Sprite, span: tuple[int, int]) -> Example:
    answer = span_answer(*span)
    question = sampler.choice(WHEN).format(name=sprite.name)
    reference = {"answer": answer, "asked": sprite.name, "span": [float(end) for end in span], "media": [video.facts()]}
    return Example((video,), ((question, answer),), reference)


def _example(sampler: SceneSampler, templates: Sequence[str], answer: str, video: SyntheticVideo) -> Example:
    return Example((video,), ((sampler.choice(templates), answer),), {"answer": answer, "media": [video.facts()]})
