"""A live stream in which each new digit must be named when it appears, and other objects must be ignored."""

from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import CELL, READABLE, SceneSampler
from data_pipelines.synthetic.vocabulary import NAMES

WATCH = ("Say each digit when it appears.", "Call out every new digit.", "Tell me when a digit appears.")
# Seconds. The request comes before the first frame: supervision would treat one inside the stream as a cue to speak.
REQUEST_TIME = -1.0
_OTHERS = ("fashion", "shape")
_NEW = 0.55  # probability that an object appears in a frame
_DIGIT = 0.5  # probability that it is a digit
_STAYS = 0.6  # probability that an object stays for one more frame


def stream(sampler: SceneSampler) -> Example:
    """Objects appear, at most one per frame, and disappear; a digit is named after the frame in which it appears."""
    height, width = sampler.choice(((56, 56), (56, 84), (84, 56)))
    num_frames = sampler.integer(5, 8)
    # A cell is reserved for the last frame, which always has a new digit: silence after the last frame has no target.
    *regions, last_region = sampler.cells((height // CELL) * (width // CELL), height, width)
    free_from = [0] * len(regions)
    tracks, words = [], {}
    for frame in range(num_frames):
        last = frame == num_frames - 1
        free_cells = [cell for cell, free in enumerate(free_from) if free <= frame]
        if not (last or (free_cells and sampler.bernoulli(_NEW))):
            continue
        is_digit = last or sampler.bernoulli(_DIGIT)
        kind = "digit" if is_digit else sampler.choice(_OTHERS)
        name = sampler.choice(NAMES[kind])
        sprite = sampler.sprite(kind, name, sampler.colour(), sampler.integer(READABLE, CELL - 1))
        stop = frame + 1
        while stop < num_frames and sampler.bernoulli(_STAYS):
            stop += 1
        region = last_region
        if not last:
            cell = sampler.choice(free_cells)
            region, free_from[cell] = regions[cell], stop + 1  # a frame's gap: objects do not replace each other
        tracks.append(sampler.place_object(sprite, region).during(frame, stop, num_frames))
        if is_digit:
            words[frame] = name
    video = sampler.video(height, width, num_frames, *tracks, noise_probability=0.15)
    utterances = [("user", sampler.choice(WATCH), REQUEST_TIME)]
    utterances += [("assistant", name, float(frame)) for frame, name in words.items()]
    details = {"answer": ", ".join(words.values()), "words": [words.get(frame) for frame in range(num_frames)]}
    return Example((video,), (), details, tuple(utterances))
