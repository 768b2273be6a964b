"""Objects of images and videos: digits, clothes and geometric shapes, cropped tightly, in one named colour each."""

import dataclasses
import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.synthetic.image_pool import ImagePool
from data_pipelines.synthetic.vocabulary import COLOURS

SHAPE_SIDE = 96  # pixels of a shape before it is scaled to its final size
_VISIBLE = 40  # minimum intensity of a pixel that belongs to the object
_JITTER = 12  # maximum deviation of a channel from the named colour, in grey levels
_STRETCH = 0.12  # maximum absolute logarithm of the horizontal scale factor
_MAX_DIGIT_ASPECT = 1.05  # width over height; wider digits would become too low to be readable
_TILT, _SLANT = 8.0, 0.12  # maximum rotation in degrees and maximum shear of a training image
_MARGIN = 4  # pixels added around an image, so that rotation cuts nothing off


@dataclasses.dataclass(frozen=True, eq=False)
class Sprite:
    """An object, ready to be pasted on a background.

    Attributes:
      kind: "digit", "fashion" or "shape".
      name: Name of the object, one of `vocabulary.NAMES[kind]`.
      colour: Name of the colour, one of `vocabulary.COLOURS`.
      rgb: The exact colour.
      intensity: [h, w] uint8, cropped tightly: the bounding box of the object is that of the array.
      image_index: Index of the source image among those of its kind in the image pool, -1 for a shape.
    """

    kind: str
    name: str
    colour: str
    rgb: tuple[int, int, int]
    intensity: np.ndarray
    image_index: int = -1

    @property
    def height(self) -> int:
        return self.intensity.shape[0]

    @property
    def width(self) -> int:
        return self.intensity.shape[1]

    def paste(self, canvas: np.ndarray, x: int, y: int) -> None:
        """Pastes the object on a canvas [h, w, 3] uint8 with its upper left corner at (x, y), clipped to the canvas."""
        top, left = max(y, 0), max(x, 0)
        bottom, right = min(y + self.height, canvas.shape[0]), min(x + self.width, canvas.shape[1])
        if bottom <= top or right <= left:
            return
        intensity = self.intensity[top - y : bottom - y, left - x : right - x].astype(np.float32)[..., None]
        colour = np.array(self.rgb, np.float32)
        background = canvas[top:bottom, left:right]
        if self.kind == "fashion":  # folds and prints stay visible within the outline
            cover, colour = np.minimum(intensity * (1 / 64), 1), colour * (0.4 + intensity * (0.6 / 255))
        else:
            cover = np.minimum(intensity * (1 / 160), 1)
        canvas[top:bottom, left:right] = background + (colour - background) * cover + 0.5


def make_sprite(
    rng: np.random.Generator, image_pool: ImagePool, kind: str, name: str, colour: str, side: int, augment: bool
) -> Sprite:
    """Makes an object of a given kind, name and colour.

    Args:
      rng: Chooses the source image and small variations of colour and shape.
      image_pool: Source images.
      kind: "digit", "fashion" or "shape".
      name: Name of the object.
      colour: Name of the colour.
      side: Length of the longer side in pixels.
      augment: Whether to rotate, shear and mirror the source image, as for training.
    """
    if kind == "shape":
        grey, image_index = shape_mask(name), -1
    else:
        grey, image_index = image_pool.sample(rng, kind, name)
        if augment:
            grey = _augment(rng, grey, mirror=kind == "fashion")
        grey = _crop(grey)
    height, width = grey.shape[0], grey.shape[1] * math.exp(rng.uniform(-_STRETCH, _STRETCH))
    if kind == "digit":
        width = min(width, height * _MAX_DIGIT_ASPECT)
    scale = side / max(height, width)
    size = max(round(width * scale), 3), max(round(height * scale), 3)
    intensity = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))
    jitter = rng.integers(-_JITTER, _JITTER + 1, 3).tolist()
    rgb = tuple(min(max(value + change, 0), 255) for value, change in zip(COLOURS[colour], jitter, strict=True))
    return Sprite(kind, name, colour, rgb, intensity, image_index)


@functools.cache
def shape_mask(name: str) -> np.ndarray:
    """Returns a mask [96, 96] uint8 that is 255 inside the shape, which spans the array as far as its form allows."""
    image = Image.new("L", (_FINE, _FINE), 0)
    draw = ImageDraw.Draw(image)
    for figure, corners, fill in _FIGURES[name]:
        getattr(draw, figure)(corners, fill=fill)
    return np.asarray(image.resize((SHAPE_SIDE, SHAPE_SIDE), Image.Resampling.BOX))


def _star() -> list[tuple[float, float]]:
    """Returns the ten corners of a star that spans `_WHOLE`."""
    angles, radii = np.arange(10) * (math.pi / 5), np.tile([1, 0.42], 5)
    points = np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    return [tuple(point) for point in ((points - low) / (high - low) * _LAST).tolist()]


_FINE = SHAPE_SIDE * 4  # pixels per side in which shapes are drawn
_LAST = _FINE - 1
_WHOLE = (0, 0, _LAST, _LAST)
# What is drawn for each shape: a method of `ImageDraw`, its coordinates, and the fill.
_FIGURES = {
    "circle": [("ellipse", _WHOLE, 255)],
    "square": [("rectangle", _WHOLE, 255)],
    "triangle": [("polygon", [(_LAST / 2, 0), (_LAST, _LAST), (0, _LAST)], 255)],
    "star": [("polygon", _star(), 255)],
    "cross": [
        ("rectangle", (_FINE * 0.34, 0, _FINE * 0.66, _LAST), 255),
        ("rectangle", (0, _FINE * 0.34, _LAST, _FINE * 0.66), 255),
    ],
    "ring": [("ellipse", _WHOLE, 255), ("ellipse", (_FINE * 0.26, _FINE * 0.26, _FINE * 0.74, _FINE * 0.74), 0)],
}


def _augment(rng: np.random.Generator, grey: np.ndarray, mirror: bool) -> np.ndarray:
    """Rotates and shears slightly, and mirrors half of the images if `mirror` is set; adds a margin."""
    tilt, slant, flip = rng.uniform(-1, 1, 3).tolist()
    if mirror and flip > 0:
        grey = grey[:, ::-1]
    padded = np.pad(grey, _MARGIN)
    angle, slant = math.radians(_TILT * tilt), _SLANT * slant
    cos, sin = math.cos(angle), math.sin(angle)
    across, down = padded.shape[1] / 2, padded.shape[0] / 2
    a, b, d, e = cos, -sin + slant * cos, sin, cos + slant * sin
    matrix = (a, b, across - a * across - b * down, d, e, down - d * across - e * down)
    image = Image.fromarray(padded)
    return np.asarray(image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))


def _crop(grey: np.ndarray) -> np.ndarray:
    visible = grey > _VISIBLE
    rows, columns = visible.any(axis=1).nonzero()[0], visible.any(axis=0).nonzero()[0]
    return grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
