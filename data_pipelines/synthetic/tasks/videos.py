"""Questions about videos: their content, the direction of motion, the order of events, and when objects are visible."""

from data_pipelines.synthetic.formats import span_answer
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import CELL, READABLE, VIDEO, SceneSampler
from data_pipelines.synthetic.scenes import SyntheticVideo, Track
from data_pipelines.synthetic.sprites import Sprite, make_sprite
from data_pipelines.synthetic.vocabulary import DIRECTIONS

SHOWN = ("What is shown?", "What does the video show?", "Name what you see.")
APPEARS = ("What appears?", "What comes in?", "What is new?")
START = ("What is there from the start?", "What is there all the time?")
DIRECTION = ("Which way does it move?", "In which direction does it move?", "Where does it go?")
FIRST = ("What appears first?", "What comes first?")
LAST = ("What appears last?", "What comes last?")
WHEN = ("When can you see the {name}?", "When is the {name} shown?", "Give the time of the {name}.")
LONG_SIZES = ((56, 84), (84, 56), (84, 84))  # at least six merge blocks, and never resampled
_BLINK = 3  # side of a blinking light in pixels


def video_name(sampler: SceneSampler) -> Example:
    """The name of the only object, which stands still or jumps about."""
    height, width = sampler.size(VIDEO)
    sprite = _random_sprite(sampler, 0.5, 0.8, height, width)
    num_frames, region = sampler.integer(4, 6), (0, 0, width, height)
    corners = [sampler.place_object(sprite, region).box[:2] for _ in range(num_frames)]
    if sampler.bernoulli(0.4):
        corners = corners[:1] * num_frames
    video = sampler.video(height, width, num_frames, Track(sprite, tuple(corners)), noise_probability=0.5)
    return Example((video,), ((sampler.choice(SHOWN), sprite.name),))


def motion(sampler: SceneSampler) -> Example:
    """The direction in which the only object crosses most of the image."""
    direction = sampler.choice(tuple(DIRECTIONS))
    height, width = sampler.size(VIDEO)
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
    video = sampler.video(height, width, num_frames, Track(sprite, corners))
    return Example((video,), ((sampler.choice(DIRECTION), direction),))


def order(sampler: SceneSampler) -> Example:
    """Which of two or three objects appears first or last."""
    count = sampler.integer(2, 3)
    height, width = sampler.choice(LONG_SIZES)
    num_frames = sampler.integer(max(4, count + 1), 6)
    starts = sorted(sampler.sample(range(num_frames), count))
    stay = sampler.bernoulli(0.5)
    stops = [num_frames] * count if stay else [*starts[1:], num_frames]
    looks = sampler.distinct_looks(count)
    tracks = []
    for look, region, start, stop in zip(looks, sampler.cells(count, height, width), starts, stops, strict=True):
        sprite = sampler.sprite(*look, sampler.integer(READABLE, CELL - 1))
        tracks.append(sampler.place_object(sprite, region).during(start, stop, num_frames))
    question, (_, answer, _) = (FIRST, looks[0]) if sampler.bernoulli(0.5) else (LAST, looks[-1])
    video = sampler.video(height, width, num_frames, *sampler.sample(tracks, count))
    return Example((video,), ((sampler.choice(question), answer),))


def when(sampler: SceneSampler) -> Example:
    """The seconds in which the only object is visible."""
    height, width = sampler.size(VIDEO)
    num_frames = sampler.integer(5, 8)
    sprite = _random_sprite(sampler, 0.4, 0.7, height, width)
    span = random_span(sampler, num_frames)
    track = sampler.place_object(sprite, (0, 0, width, height)).during(*span, num_frames)
    return _span_example(sampler, sampler.video(height, width, num_frames, track), sprite.name, span)


def when_of_two(sampler: SceneSampler) -> Example:
    """The seconds in which the named one of two objects is visible."""
    video, spans = two_timed_objects(sampler)
    return _span_example(sampler, video, *sampler.choice(list(spans.items())))


def talk_of_times(sampler: SceneSampler) -> Example:
    """When each of two objects is visible, and which appears first."""
    video, spans = two_timed_objects(sampler)
    turns = [(sampler.choice(WHEN).format(name=name), span_answer(*span)) for name, span in spans.items()]
    early, late = sorted(spans, key=lambda name: spans[name][0])
    if spans[early][0] < spans[late][0]:
        turns.append((sampler.choice(FIRST), early))
    return Example((video,), tuple(sampler.sample(turns, len(turns))))


def static(sampler: SceneSampler) -> Example:
    """An almost static video: a light blinks or a small object appears. At least half of the tokens can be pruned."""
    height, width = sampler.choice(LONG_SIZES)
    num_frames = sampler.integer(5, 8)
    # Changes are confined to the last merge blocks along the longer side.
    across = width >= height
    static_region = (0, 0, width - CELL, height) if across else (0, 0, width, height - CELL)
    available = min(static_region[2], static_region[3])
    look, new_look = sampler.distinct_looks(2)
    sprite = sampler.sprite(*look, sampler.integer(0.55 * available, 0.9 * available))
    tracks = [sampler.place_object(sprite, static_region).during(0, num_frames, num_frames)]
    offset = sampler.integer(0, (height if across else width) // CELL - 1) * CELL
    x, y = (width - CELL, offset) if across else (offset, height - CELL)
    question, answer = SHOWN, sprite.name
    if sampler.bernoulli(0.5):
        new_sprite = sampler.sprite(*new_look, sampler.integer(READABLE, CELL - 2))
        start = sampler.integer(1, num_frames - 1)
        new_object = sampler.place_object(new_sprite, (x, y, x + CELL, y + CELL))
        tracks.append(new_object.during(start, num_frames, num_frames))
        question, answer = (APPEARS, new_sprite.name) if sampler.bernoulli(0.6) else (START, sprite.name)
    elif sampler.bernoulli(0.5):
        light = make_sprite(sampler.rng, sampler.image_pool, "shape", "square", "white", _BLINK, augment=False)
        tracks.append(Track(light, tuple((x + CELL - 15, y + 3) if n % 2 else None for n in range(num_frames))))
    video = sampler.video(height, width, num_frames, *tracks, noise_probability=0)
    return Example((video,), ((sampler.choice(question), answer),))


def two_timed_objects(sampler: SceneSampler) -> tuple[SyntheticVideo, dict[str, tuple[int, int]]]:
    """Makes a video of two objects side by side; returns it and the span of frames of each object, by name."""
    height, width = sampler.choice((*LONG_SIZES, (56, 56)))
    num_frames = sampler.integer(5, 8)
    spans = random_span(sampler, num_frames), random_span(sampler, num_frames)
    halves = sampler.sample(sampler.halves(height, width), 2)
    looks = sampler.distinct_looks(2)
    tracks = [
        sampler.fill(region, look, 0.75).during(*span, num_frames)
        for region, look, span in zip(halves, looks, spans, strict=True)
    ]
    names = (name for _, name, _ in looks)
    return sampler.video(height, width, num_frames, *tracks), dict(zip(names, spans, strict=True))


def random_span(sampler: SceneSampler, num_frames: int) -> tuple[int, int]:
    """Returns a random span [start, stop) of frames shorter than the video; all lengths are equally likely."""
    length = sampler.integer(1, num_frames - 1)
    start = sampler.integer(0, num_frames - length)
    return start, start + length


def _random_sprite(sampler: SceneSampler, low: float, high: float, height: int, width: int) -> Sprite:
    """Makes a random object whose longer side is a share from `low` to `high` of the image's shorter side."""
    kind, name = sampler.kind_and_name()
    smaller = min(height, width)
    return sampler.sprite(kind, name, sampler.colour(), sampler.integer(low * smaller, high * smaller))


def _span_example(sampler: SceneSampler, video: SyntheticVideo, name: str, span: tuple[int, int]) -> Example:
    question = sampler.choice(WHEN).format(name=name)
    return Example((video,), ((question, span_answer(*span)),), {"asked": name, "span": [float(end) for end in span]})
