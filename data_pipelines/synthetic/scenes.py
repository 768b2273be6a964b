"""Descriptions of images and videos: which objects are where, and when. Rendering is a pure function of them."""

import dataclasses
from typing import Any

import numpy as np

from data_pipelines.synthetic.backgrounds import Background
from data_pipelines.synthetic.sprites import Sprite

Box = tuple[int, int, int, int]
_NOISE = 3  # maximum change of a value by camera noise, in grey levels


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedObject:
    """A sprite and the pixel coordinates of its upper left corner."""

    sprite: Sprite
    x: int
    y: int

    @property
    def box(self) -> Box:
        """The bounding box x0, y0, x1, y1 in pixels, x1 and y1 excluded."""
        return self.x, self.y, self.x + self.sprite.width, self.y + self.sprite.height

    def during(self, start: int, stop: int, num_frames: int) -> "Track":
        """Returns the object of a video that stands here in the frames [start, stop) and is absent in the others."""
        corner = self.x, self.y
        return Track(self.sprite, tuple(corner if start <= frame < stop else None for frame in range(num_frames)))


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """An image.

    Attributes:
      height: Height in pixels.
      width: Width in pixels.
      background: Background of the image.
      objects: Objects in the order in which they are rendered; later ones cover earlier ones.
    """

    height: int
    width: int
    background: Background
    objects: tuple[PlacedObject, ...]

    def pixels(self) -> np.ndarray:
        """Renders the image as [h, w, 3] uint8."""
        canvas = self.background.render(self.height, self.width)
        for placed in self.objects:
            placed.sprite.paste(canvas, placed.x, placed.y)
        return canvas

    def facts(self) -> dict[str, Any]:
        """Returns the size and the objects as JSON values."""
        return {
            "size": [self.height, self.width],
            "objects": [_facts(placed.sprite) | {"box": list(placed.box)} for placed in self.objects],
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Track:
    """An object of a video.

    Attributes:
      sprite: Appearance of the object.
      corners: For each frame, x and y of the upper left corner in pixels, or None where the object is absent.
    """

    sprite: Sprite
    corners: tuple[tuple[int, int] | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class SyntheticVideo:
    """A video of one frame per second; frame k lasts from second k to second k + 1.

    Attributes:
      height: Height in pixels.
      width: Width in pixels.
      num_frames: Number of frames.
      background: Background of all frames.
      tracks: Objects in the order in which they are rendered; later ones cover earlier ones.
      noise_seed: Random seed of the camera noise. None means no noise: unchanged parts are then equal bit for bit.
    """

    height: int
    width: int
    num_frames: int
    background: Background
    tracks: tuple[Track, ...]
    noise_seed: int | None = None

    @property
    def times(self) -> list[float]:
        """The start of each frame in seconds."""
        return [float(frame) for frame in range(self.num_frames)]

    def pixels(self) -> np.ndarray:
        """Renders the video as [num_frames, h, w, 3] uint8."""
        background = self.background.render(self.height, self.width)
        frames = np.repeat(background[None], self.num_frames, axis=0)
        for track in self.tracks:
            for frame, corner in enumerate(track.corners):
                if corner is not None:
                    track.sprite.paste(frames[frame], *corner)
        return frames if self.noise_seed is None else _add_noise(frames, self.noise_seed)

    def facts(self) -> dict[str, Any]:
        """Returns the size, the number of frames and the objects as JSON values."""
        objects = []
        for track in self.tracks:
            boxes = [corner and list(PlacedObject(track.sprite, *corner).box) for corner in track.corners]
            objects.append(_facts(track.sprite) | {"boxes": boxes})
        return {"size": [self.height, self.width], "frames": self.num_frames, "objects": objects}


def _facts(sprite: Sprite) -> dict[str, Any]:
    return {"kind": sprite.kind, "name": sprite.name, "colour": sprite.colour, "image_index": sprite.image_index}


def _add_noise(frames: np.ndarray, seed: int) -> np.ndarray:
    spread = 2 * _NOISE + 1
    noise = np.frombuffer(np.random.default_rng(seed).bytes(frames.size), np.uint8).reshape(frames.shape)
    clipped = np.clip(frames, _NOISE, 255 - _NOISE)
    return clipped - np.uint8(_NOISE) + noise % np.uint8(spread)
