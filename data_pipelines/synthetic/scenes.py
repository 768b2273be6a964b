"""Pictures and clips before they are drawn: which things lie where, and when. Drawing is a pure function of them."""

import dataclasses
from typing import Any

import numpy as np

from data_pipelines.synthetic.backgrounds import Background
from data_pipelines.synthetic.sprites import Sprite

Box = tuple[int, int, int, int]
_NOISE = 3  # grey levels by which a noisy camera changes each value, at most


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedObject:
    """A thing with the pixel of its upper left corner."""

    sprite: Sprite
    x: int
    y: int

    @property
    def box(self) -> Box:
        """x0, y0, x1, y1 in pixels; the last two just outside."""
        return self.x, self.y, self.x + self.sprite.width, self.y + self.sprite.height


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """A picture; later things cover earlier ones."""

    height: int
    width: int
    background: Background
    placed: tuple[PlacedObject, ...]

    def pixels(self) -> np.ndarray:
        """[h, w, 3] uint8."""
        canvas = self.background.draw(self.height, self.width)
        for one in self.placed:
            one.sprite.paste(canvas, one.x, one.y)
        return canvas

    def facts(self) -> dict[str, Any]:
        """What is in it, for JSON."""
        return {
            "size": [self.height, self.width],
            "objects": [_facts(one.sprite) | {"box": list(one.box)} for one in self.placed],
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Track:
    """A thing in a clip: its corner in each frame, None where it is not to be seen."""

    sprite: Sprite
    corners: tuple[tuple[int, int] | None, ...]

    @property
    def seen(self) -> list[int]:
        """The frames in which it is."""
        return [frame for frame, corner in enumerate(self.corners) if corner is not None]


@dataclasses.dataclass(frozen=True, eq=False)
class SyntheticVideo:
    """A video of one frame a second; frame k is shown from k to k + 1 s.

    Attributes:
      height: pixels.
      width: pixels.
      frames: how many.
      ground: of all frames.
      tracks: later ones cover earlier ones.
      noise_seed: of a noisy camera; None for a clean one, whose still parts are equal to the last bit.
    """

    height: int
    width: int
    frames: int
    background: Background
    tracks: tuple[Track, ...]
    noise_seed: int | None = None

    @property
    def times(self) -> list[float]:
        """When each frame begins, seconds."""
        return [float(frame) for frame in range(self.frames)]

    def pixels(self) -> np.ndarray:
        """[frames, h, w, 3] uint8."""
        background = self.background.draw(self.height, self.width)
        frames_array = np.repeat(background[None], self.frames, axis=0)
        for track in self.tracks:
            for frame, corner in enumerate(track.corners):
                if corner is not None:
                    track.sprite.paste(frames_array[frame], *corner)
        return frames_array if self.noise_seed is None else _noisy(frames_array, self.noise_seed)

    def facts(self) -> dict[str, Any]:
        """What is in it, for JSON."""
        objects = []
        for track in self.tracks:
            sides = track.sprite.width, track.sprite.height
            boxes = [None if at is None else [*at, at[0] + sides[0], at[1] + sides[1]] for at in track.corners]
            objects.append(_facts(track.sprite) | {"boxes": boxes})
        return {"size": [self.height, self.width], "frames": self.frames, "objects": objects}


def _facts(sprite: Sprite) -> dict[str, Any]:
    return {"kind": sprite.kind, "name": sprite.name, "colour": sprite.colour, "picture": sprite.number}


def _noisy(frames_array: np.ndarray, seed: int) -> np.ndarray:
    spread = 2 * _NOISE + 1
    random = np.frombuffer(np.random.default_rng(seed).bytes(frames_array.size), np.uint8).reshape(frames_array.shape)
    lifted = np.clip(frames_array, _NOISE, 255 - _NOISE)
    return lifted - np.uint8(_NOISE) + random % np.uint8(spread)
