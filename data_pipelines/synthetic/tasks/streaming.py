"""A live stream in which digits are to be called out as they appear, and everything else is to be passed over."""

from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import CELL, READABLE, SceneSampler
from data_pipelines.synthetic.scenes import Track
from data_pipelines.synthetic.vocabulary import COLOURS, NAMES

WATCH = ("Say each digit when it appears.", "Call out every new digit.", "Tell me when a digit appears.")
# The request comes before the first frame: one that interrupts the stream would be learned as a moment to speak.
REQUEST_TIME = -1.0
_OTHERS = ("fashion", "shape")
_NEW = 0.55  # chance that something appears in a frame
_DIGIT = 0.5  # chance that it is a digit
_STAYS = 0.6  # chance that what is there stays for the next frame


def stream(sampler: SceneSampler) -> Example:
    """Things come and go, at most one new in a frame; a new digit is said in the frame it appears in."""
    height, width = sampler.pick(((56, 56), (56, 84), (84, 56)))
    frames = sampler.between(5, 8)
    # One place is kept for the last frame, which is always worth a word: what comes after it is not learned from.
    *regions, last_region = sampler.cells((height // CELL) * (width // CELL), height, width)
    free_from = [0] * len(regions)
    tracks, speaks = [], {}
    for frame in range(frames):
        last = frame == frames - 1
        spots = [rank for rank, free in enumerate(free_from) if free <= frame]
        if not (last or (spots and sampler.chance(_NEW))):
            continue
        is_digit = last or sampler.chance(_DIGIT)
        kind = "digit" if is_digit else sampler.pick(_OTHERS)
        name = sampler.pick(NAMES[kind])
        sprite = sampler.sprite(kind, name, sampler.pick(list(COLOURS)), sampler.between(READABLE, CELL - 1))
        stop = frame + 1
        while stop < frames and sampler.chance(_STAYS):
            stop += 1
        region = last_region
        if not last:
            spot = sampler.pick(spots)
            region, free_from[spot] = regions[spot], stop + 1  # nothing turns into something else on the spot
        at = sampler.placed(sprite, region)
        corners = [(at.x, at.y) if frame <= now < stop else None for now in range(frames)]
        tracks.append(Track(sprite, tuple(corners)))
        if is_digit:
            speaks[frame] = name
    clip = sampler.clip(height, width, frames, *tracks, noisy=0.15)
    said = [("user", sampler.pick(WATCH), REQUEST_TIME)]
    said += [("assistant", name, float(frame)) for frame, name in speaks.items()]
    truth = {
        "answer": ", ".join(speaks.values()),
        "words": [speaks.get(frame) for frame in range(frames)],
        "media": [clip.facts()],
    }
    return Example((clip,), (), truth, tuple(said))
