"""A packed row as a picture: what the model is shown of it, and where it learns."""

import colorsys
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from vl3_jax.processing.resize import PATCH

_WIDTH = 1600
_BAR = 14  # pixels a line of the token bar is high
_GAP = 6
_FRAME = 120  # height of a frame in the picture
_PADDING = (40, 40, 40)
_DIM, _VEIL = 0.3, 70  # a pruned patch shows so much of itself under grey of this level, seen on black too


def render_row(arrays: Mapping[str, np.ndarray], row: int = 0) -> Image.Image:
    """Draws one text row of a packed batch.

    The bar on top is the row's tokens in reading order, each sample in its colour: vision tokens pale, text full, with
    a white mark below each token that is learned. Then the frames, framed in the colour of their sample, pruned
    patches under a grey veil.
    """
    used = max(int((arrays["segment_ids"][row] > 0).sum()), 1)
    bar = _token_bar(*(arrays[name][row][:used] for name in ("segment_ids", "vision_slot", "loss_weight")))
    frames = _frames(arrays, row)
    lines, x, y = [], 0, bar.height + _GAP
    for image, colour in frames:
        if x and x + image.width + 4 > _WIDTH:
            x, y = 0, y + _FRAME + 4 + _GAP
        lines.append((x, y, image, colour))
        x += image.width + 4 + _GAP
    canvas = Image.new("RGB", (_WIDTH, y + (_FRAME + 4 if frames else 0)), "black")
    canvas.paste(bar, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for left, top, image, colour in lines:
        draw.rectangle((left, top, left + image.width + 3, top + image.height + 3), fill=colour)
        canvas.paste(image, (left + 2, top + 2))
    return canvas


def colour_of(segment: int) -> tuple[int, int, int]:
    """A colour unlike those of the segments next to it."""
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(segment * 0.381966 % 1, 0.75, 0.95))


def _token_bar(segments: np.ndarray, slots: np.ndarray, weights: np.ndarray) -> Image.Image:
    """Lines of `_WIDTH` / 2 tokens, each token two pixels wide."""
    colours = np.array([_PADDING, *(colour_of(n) for n in range(1, int(segments.max(initial=0)) + 1))], np.float32)
    tokens = colours[segments]
    tokens[slots >= 0] = tokens[slots >= 0] * 0.4 + 0.6 * 160
    # A weight belongs to predicting the token after it.
    learned = np.roll(weights, 1) > 0
    marks = np.where(learned[:, None], 255, 0) * np.ones(3)
    per_line = _WIDTH // 2
    lines = []
    for start in range(0, len(segments), per_line):
        line = np.zeros((_BAR, per_line, 3), np.uint8)
        here = slice(start, start + per_line)
        count = len(segments[here])
        line[: _BAR - 6, :count] = tokens[here]
        line[_BAR - 5 : _BAR - 2, :count] = marks[here]
        lines.append(line)
    return Image.fromarray(np.concatenate(lines).repeat(2, axis=1))


def _frames(arrays: Mapping[str, np.ndarray], row: int) -> list[tuple[Image.Image, tuple[int, int, int]]]:
    """Each frame of the row with its sample's colour; grey for frames of which no token is left."""
    patch_segment, patch_hw, patches = (arrays[name][row] for name in ("patch_segment", "patch_hw", "patches"))
    per_row = patch_segment.shape[1]
    owner = _owners(arrays, row)
    found = []
    for vision_row, numbers in enumerate(patch_segment):
        for frame in range(1, int(numbers.max(initial=0)) + 1):
            here = np.flatnonzero(numbers == frame)
            owners = owner[vision_row * per_row + here]
            segment = int(owners.max())
            scaled = Image.fromarray(assembled(patches[vision_row][here], patch_hw[vision_row][here], owners > 0))
            width = max(1, min(round(scaled.width * _FRAME / scaled.height), _WIDTH - 8))
            colour = colour_of(segment) if segment else (90, 90, 90)
            found.append((scaled.resize((width, _FRAME), Image.Resampling.BILINEAR), colour))
    return found


def _owners(arrays: Mapping[str, np.ndarray], row: int) -> np.ndarray:
    """[R * N] the text segment that sees each patch, 0 for none."""
    slots, segments = arrays["vision_slot"][row], arrays["segment_ids"][row]
    owner = np.zeros(arrays["patch_segment"][row].size, np.int32)
    named = arrays["token_patches"][row][slots[slots >= 0]]
    for column in named.T:
        owner[column[column >= 0]] = segments[slots >= 0][column >= 0]
    return owner


def assembled(patches: np.ndarray, places: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """One frame: patches [n, 588] uint8, their row and column [n, 2], and which are kept [n] -> [h, w, 3] uint8."""
    rows, columns = places.max(axis=0) + 1
    image = np.zeros((rows, columns, PATCH, PATCH, 3), np.uint8)
    pixels = patches.reshape(-1, 3, PATCH, PATCH).transpose(0, 2, 3, 1)
    veiled = pixels * _DIM + (1 - _DIM) * _VEIL
    image[places[:, 0], places[:, 1]] = np.where(kept[:, None, None, None], pixels, veiled)
    return image.transpose(0, 2, 1, 3, 4).reshape(rows * PATCH, columns * PATCH, 3)
