"""Draws masks of objects over pictures, each in a colour of its own and with its name, and writes videos of them."""

import colorsys
import os
import pathlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vl3_jax.errors import InputError
from vl3_jax.processing.output_files import new_file, refuse_unwritable

PICTURES, VIDEOS = (".png", ".jpg", ".jpeg", ".webp"), (".mp4", ".mov", ".mkv")
_GOLDEN_RATIO = 0.618034  # of the circle of hues; each next colour is far from all before it
_OPACITY = 0.5
_OUTLINES = 400  # a picture's shorter side over the width of an outline
_LINES = 28  # and over the height of a name
_MARGIN = 2  # pixels around it
_TIME_BASE = Fraction(1, 90_000)
_MAX_RATE = 240
# No frame refers to a later one, so that times begin with 0; each key frame begins a part that can be played.
_QUALITY = {"crf": "20", "bf": "0", "g": "25"}


def object_colour(number: int) -> tuple[int, int, int]:
    """Returns the RGB colour of the object that comes at place `number`."""
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN_RATIO % 1, 0.8, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_masks(image: Image.Image, masks: Sequence[np.ndarray] | np.ndarray, names: Sequence[str]) -> Image.Image:
    """Returns a picture with masks over it; the picture itself is left as it is.

    Args:
      image: The picture, RGB.
      masks: Mask of each object, [h, w] bool of the picture's size. An empty one is not drawn.
      names: Name of each object.
    """
    pixels, short = np.array(image), min(image.size)
    kernel = np.ones((2 * max(1, short // _OUTLINES) + 1,) * 2, np.uint8)
    for number, mask in enumerate(masks):
        colour = np.array(object_colour(number))
        pixels[mask] = (1 - _OPACITY) * pixels[mask] + _OPACITY * colour
        inner = cv2.erode(mask.astype(np.uint8), kernel)
        pixels[mask & (inner == 0)] = colour
    drawn = Image.fromarray(pixels)
    font = ImageFont.load_default(max(10, short // _LINES))
    for number, (mask, name) in enumerate(zip(masks, names, strict=True)):
        if mask.any():
            _write_name(drawn, mask, name, object_colour(number), font)
    return drawn


def _write_name(image: Image.Image, mask: np.ndarray, name: str, colour: tuple[int, int, int], font: Any) -> None:
    """Writes a name above the top left corner of its mask, as far as there is room."""
    draw = ImageDraw.Draw(image)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    width, height = (round(end) + 2 * _MARGIN for end in draw.textbbox((0, 0), name, font=font)[2:])
    x = max(0, min(int(columns[0]), image.width - width))
    y = max(0, int(rows[0]) - height)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    dark = np.dot(colour, (0.299, 0.587, 0.114)) > 110
    draw.text((x + _MARGIN, y + _MARGIN), name, fill=(0, 0, 0) if dark else (255, 255, 255), font=font)


def overlay_file(file: str | os.PathLike, of_video: bool) -> pathlib.Path:
    """Checks where a picture or a video with masks is to be written, and creates nothing.

    Raises:
      InputError: The file exists, cannot be written, or its name has another ending.
    """
    path, endings = new_file(file), VIDEOS if of_video else PICTURES
    if path.suffix.lower() not in endings:
        what = "a video" if of_video else "an image"
        raise InputError(f"{path}: masks over {what} are written as {', '.join(endings)}; give one of these endings")
    return path


class VideoWriter:
    """Writes pictures as a video, frame by frame, each shown at its own time.

    What is written can be played even if the process ends on the way.
    """

    def __init__(self, path: str | os.PathLike, size: tuple[int, int], rate: float):
        """Creates the file.

        Args:
          path: File; its ending chooses the container.
          size: Height and width. Frames of another size are resized to it.
          rate: Typical number of frames per second.

        Raises:
          InputError: The file cannot be written.
        """
        self._path, self._size = path, size
        options = {"flush_packets": "1"}
        if not os.fspath(path).endswith(".mkv"):
            options["movflags"] = "frag_keyframe+hybrid_fragmented"
        with self._errors():
            self._container = av.open(os.fspath(path), "w", options=options)
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            rate_of_frames = Fraction(min(max(rate, 1), _MAX_RATE)).limit_denominator(1001)
            stream = self._container.add_stream(codec, rate=rate_of_frames, options=_QUALITY)
            assert isinstance(stream, av.VideoStream)
            # Chroma has half of the resolution, so an odd row or column is doubled.
            stream.height, stream.width, stream.pix_fmt = size[0] + size[0] % 2, size[1] + size[1] % 2, "yuv420p"
            stream.codec_context.time_base = stream.time_base = _TIME_BASE
        self._stream, self._first, self._last = stream, 0.0, -1

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        """Completes the file."""
        with self._errors():
            self._container.mux(self._stream.encode(None))
            self._container.close()

    def write(self, image: Image.Image, seconds: float) -> None:
        """Adds a picture.

        Args:
          image: The picture, RGB.
          seconds: Its time; the video begins with the first one. Times may also run backwards.

        Raises:
          InputError: The file cannot be written.
        """
        height, width = self._size
        resized = image if image.size == (width, height) else image.resize((width, height))
        pixels = np.pad(np.asarray(resized), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._last < 0:
            self._first = seconds
        frame = av.VideoFrame.from_ndarray(pixels)
        self._last = max(self._last + 1, round(abs(seconds - self._first) / _TIME_BASE))
        frame.pts, frame.time_base = self._last, _TIME_BASE
        with self._errors():
            self._container.mux(self._stream.encode(frame))

    def _errors(self):
        return refuse_unwritable(self._path, "file")
