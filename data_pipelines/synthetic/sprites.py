"""What lies in a picture: a digit, something to wear or a drawn shape, cut out tightly, in one named colour."""

import dataclasses
import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.synthetic.image_pool import ImagePool
from data_pipelines.synthetic.vocabulary import COLOURS

SHAPE_SIDE = 96  # pixels in which a shape is drawn before it is scaled down
_VISIBLE = 40  # light from which a pixel belongs to the thing
_JITTER = 12  # grey levels by which a colour may differ from the named one
_STRETCH = 0.12  # logarithm of the change of width, at most
_WIDEST_DIGIT = 1.05  # width over height; sprawling digits would end up too low to be read
_TILT, _SLANT = 8.0, 0.12  # degrees and shear, at most, of a training picture
_MARGIN = 4  # pixels around a picture, so that tilting cuts nothing off


@dataclasses.dataclass(frozen=True, eq=False)
class Sprite:
    """One object, ready to be laid on a ground.

    Attributes:
      kind: "digit", "fashion" or "shape".
      name: see `vocabulary`.
      colour: its name.
      rgb: the very colour.
      light: [h, w] uint8; tight, so the thing's box is that of the array.
      number: of its picture in the bank, -1 for a shape.
    """

    kind: str
    name: str
    colour: str
    rgb: tuple[int, int, int]
    light: np.ndarray
    number: int = -1

    @property
    def height(self) -> int:
        return self.light.shape[0]

    @property
    def width(self) -> int:
        return self.light.shape[1]

    def paste(self, canvas: np.ndarray, x: int, y: int) -> None:
        """Lays it on a canvas [h, w, 3] uint8 with its upper left corner at (x, y); what sticks out is cut off."""
        top, left = max(y, 0), max(x, 0)
        bottom, right = min(y + self.height, canvas.shape[0]), min(x + self.width, canvas.shape[1])
        if bottom <= top or right <= left:
            return
        light = self.light[top - y : bottom - y, left - x : right - x].astype(np.float32)[..., None]
        colour = np.array(self.rgb, np.float32)
        background = canvas[top:bottom, left:right]
        if self.kind == "fashion":  # folds and prints stay visible within the outline
            cover, colour = np.minimum(light * (1 / 64), 1), colour * (0.4 + light * (0.6 / 255))
        else:
            cover = np.minimum(light * (1 / 160), 1)
        canvas[top:bottom, left:right] = background + (colour - background) * cover + 0.5


def make_sprite(
    rng: np.random.Generator, image_pool: ImagePool, kind: str, name: str, colour: str, side: int, varied: bool
) -> Sprite:
    """A thing of a given kind, name and colour.

    Args:
      rng: chooses the picture, and small differences of colour and form.
      bank: of pictures.
      kind: see `Sprite`.
      name: see `Sprite`.
      colour: see `Sprite`.
      side: pixels of its longer side.
      varied: tilt, slant and mirror it as well, as training pictures are.
    """
    if kind == "shape":
        grey, number = shape_mask(name), -1
    else:
        grey, number = image_pool.draw(rng, kind, name)
        if varied:
            grey = _turned(rng, grey, mirror=kind == "fashion")
        grey = _tight(grey)
    height, width = grey.shape[0], grey.shape[1] * math.exp(rng.uniform(-_STRETCH, _STRETCH))
    if kind == "digit":
        width = min(width, height * _WIDEST_DIGIT)
    scale = side / max(height, width)
    size = max(round(width * scale), 3), max(round(height * scale), 3)
    light = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))
    jitter = rng.integers(-_JITTER, _JITTER + 1, 3).tolist()
    rgb = tuple(min(max(value + change, 0), 255) for value, change in zip(COLOURS[colour], jitter, strict=True))
    return Sprite(kind, name, colour, rgb, light, number)


@functools.cache
def shape_mask(name: str) -> np.ndarray:
    """[96, 96] uint8: 255 within the shape, which touches all four edges (as nearly as its form allows)."""
    fine = SHAPE_SIDE * 4
    image = Image.new("L", (fine, fine), 0)
    draw = ImageDraw.Draw(image)
    last = fine - 1
    if name in ("circle", "ring"):
        draw.ellipse((0, 0, last, last), fill=255)
        if name == "ring":
            draw.ellipse((fine * 0.26, fine * 0.26, fine * 0.74, fine * 0.74), fill=0)
    elif name == "square":
        draw.rectangle((0, 0, last, last), fill=255)
    elif name == "triangle":
        draw.polygon([(last / 2, 0), (last, last), (0, last)], fill=255)
    elif name == "cross":
        draw.rectangle((fine * 0.34, 0, fine * 0.66, last), fill=255)
        draw.rectangle((0, fine * 0.34, last, fine * 0.66), fill=255)
    elif name == "star":
        points = [
            (radius * math.sin(math.pi * step / 5), -radius * math.cos(math.pi * step / 5))
            for step, radius in zip(range(10), [1, 0.42] * 5, strict=True)
        ]
        low, high = np.min(points, axis=0), np.max(points, axis=0)
        scaled = (np.array(points) - low) / (high - low) * last
        draw.polygon([tuple(point) for point in scaled.tolist()], fill=255)
    else:
        raise ValueError(f"no shape {name!r}")
    return np.asarray(image.resize((SHAPE_SIDE, SHAPE_SIDE), Image.Resampling.BOX))


def _turned(rng: np.random.Generator, grey: np.ndarray, mirror: bool) -> np.ndarray:
    """Slightly tilted and slanted, perhaps mirrored, within a margin."""
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


def _tight(grey: np.ndarray) -> np.ndarray:
    visible = grey > _VISIBLE
    rows, columns = visible.any(axis=1).nonzero()[0], visible.any(axis=0).nonzero()[0]
    return grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
