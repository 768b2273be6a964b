"""Renders a packed row as an image: what the model sees of it, and which tokens are supervised."""

import colorsys
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps

from vl3_jax.processing.patchify import unpatchify

_WIDTH = 1600
_BAR = 14  # height in pixels of a line of the token bar
_GAP = 6
_FRAME = 120  # height of a frame in the image
_BORDER = 2
_PADDING = (40, 40, 40)


def render_row(arrays: Mapping[str, np.ndarray], row: int = 0) -> Image.Image:
    """Renders one text row of a packed batch.

    The bar on top shows the row's tokens in reading order, each sample in its own colour: vision tokens pale, text
    saturated, with a white mark below each supervised token. Below it are the frames, each with a border in the colour
    of its sample and with pruned patches greyed.

    Args:
      arrays: The packed batch.
      row: Index of the text row.
    """
    used = max(int((arrays["segment_ids"][row] > 0).sum()), 1)
    bar = _token_bar(*(arrays[name][row][:used] for name in ("segment_ids", "vision_slot", "loss_weight")))
    frames = _frames(arrays, row)
    tiles, x, y = [(bar, (0, 0))], 0, bar.height + _GAP
    height = _FRAME + 2 * _BORDER
    for image in frames:
        if x and x + image.width > _WIDTH:
            x, y = 0, y + height + _GAP
        tiles.append((image, (x, y)))
        x += image.width + _GAP
    canvas = Image.new("RGB", (_WIDTH, y + (height if frames else 0)), "black")
    for image, corner in tiles:
        canvas.paste(image, corner)
    return canvas


def segment_colour(segment: int) -> tuple[int, int, int]:
    """Returns an RGB colour that differs clearly from those of neighbouring segments."""
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(segment * 0.381966 % 1, 0.75, 0.95))


def _token_bar(segments: np.ndarray, slots: np.ndarray, weights: np.ndarray) -> Image.Image:
    """Draws lines of `_WIDTH` / 2 tokens, each token two pixels wide."""
    colours = [_PADDING, *(segment_colour(n) for n in range(1, int(segments.max(initial=0)) + 1))]
    tokens = np.array(colours, np.float32)[segments]
    tokens[slots >= 0] = tokens[slots >= 0] * 0.4 + 0.6 * 160
    # The loss weight at a position belongs to the prediction of the next token.
    marks = np.where(np.roll(weights, 1) > 0, 255, 0)
    line, column = np.divmod(np.arange(len(segments)), _WIDTH // 2)
    bar = np.zeros((line[-1] + 1, _BAR, _WIDTH // 2, 3), np.uint8)
    bar[line, : _BAR - 6, column] = tokens[:, None]
    bar[line, _BAR - 5 : _BAR - 2, column] = marks[:, None, None]
    return Image.fromarray(bar.reshape(-1, _WIDTH // 2, 3).repeat(2, axis=1))


def _frames(arrays: Mapping[str, np.ndarray], row: int) -> list[Image.Image]:
    """Returns each frame of the row in a border of its sample's colour; grey if no token of the frame is kept."""
    patch_segment, patch_hw, patches = (arrays[name][row] for name in ("patch_segment", "patch_hw", "patches"))
    per_row = patch_segment.shape[1]
    owners = _patch_owners(arrays, row)
    frames = []
    for vision_row, frame_ids in enumerate(patch_segment):
        for frame in range(1, int(frame_ids.max(initial=0)) + 1):
            members = np.flatnonzero(frame_ids == frame)
            frame_owners = owners[vision_row * per_row + members]
            segment = int(frame_owners.max())
            pixels = unpatchify(patches[vision_row][members], patch_hw[vision_row][members], frame_owners > 0)
            image = Image.fromarray(pixels)
            width = max(1, min(round(image.width * _FRAME / image.height), _WIDTH - 8))
            colour = segment_colour(segment) if segment else (90, 90, 90)
            image = image.resize((width, _FRAME), Image.Resampling.BILINEAR)
            frames.append(ImageOps.expand(image, _BORDER, colour))
    return frames


def _patch_owners(arrays: Mapping[str, np.ndarray], row: int) -> np.ndarray:
    """Returns [R * N] int32, the text segment that uses each patch, 0 for none."""
    slots, segments = arrays["vision_slot"][row], arrays["segment_ids"][row]
    owners = np.zeros(arrays["patch_segment"][row].size, np.int32)
    token_patches = arrays["token_patches"][row][slots[slots >= 0]]
    for column in token_patches.T:
        owners[column[column >= 0]] = segments[slots >= 0][column >= 0]
    return owners
