"""Points, boxes and masks that prompt objects in an image or in a frame of a video, and their arrays."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.processing.images import open_image
from vl3_jax.processing.resampling import bilinear_matrix

BACKGROUND, FOREGROUND, FIRST_CORNER, SECOND_CORNER = range(4)
NOT_A_POINT, PADDING = -1, -10  # the end of a prompt; a token that no prompt has


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Where an object is, in pixels of the frame.

    Attributes:
      frame: Index of the frame, from 0.
      obj: Number or name of the object, any that the caller chooses.
      points: Column, row and label of each point; the label is 1 on the object and 0 beside it.
      box: Columns and rows of two opposite corners: x0, y0, x1, y1.
      mask: The object's mask, of the size of the frame: an array [h, w], or an image file whose brighter half is the
        object. It stands alone.
      correction: Whether the points correct what is tracked from other frames. Otherwise the object is seen anew.
      vector: What a language model says of the object, [width] float32; alone, or with points and a box.
    """

    frame: int = 0
    obj: int | str = 1
    points: Sequence[tuple[float, float, int]] = ()
    box: Sequence[float] | None = None
    mask: Any = None
    correction: bool = False
    vector: np.ndarray | None = None

    def checked(self, height: int, width: int) -> "Prompt":
        """Returns the prompt with its mask as an array [height, width] bool.

        Raises:
          InputError: A point or corner is outside the frame, the box has no area, the mask cannot be read or is of
            another size, or there is nothing or too much in the prompt.
        """
        name, size = f"prompt of object {self.obj} in frame {self.frame}", f"{width} x {height} pixels"
        others = self.points or self.box is not None or self.correction or self.vector is not None
        if self.mask is not None and others:
            raise InputError(f"{name}: a mask stands alone; leave out points, box and correction")
        if self.mask is None and not self.points and self.box is None and self.vector is None:
            raise InputError(f"{name}: has no point, box or mask; give one")
        if self.box is not None and len(self.box) != 4:
            raise InputError(f"{name}: a box of {len(self.box)} numbers; give four, x0, y0, x1, y1")
        corners = () if self.box is None else (self.box[:2], self.box[2:])
        for x, y in (*(point[:2] for point in self.points), *corners):
            if not (math.isfinite(x) and math.isfinite(y) and 0 <= x <= width and 0 <= y <= height):
                raise InputError(f"{name}: ({x:g}, {y:g}) is outside the frame of {size}; give pixels of the frame")
        if labels := [point[2] for point in self.points if point[2] not in (BACKGROUND, FOREGROUND)]:
            raise InputError(f"{name}: label {labels[0]!r} of a point; give 1 on the object and 0 beside it")
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise InputError(f"{name}: the box {self.box} has no area; give x0 < x1 and y0 < y1")
        if self.mask is None:
            return self
        mask = read_mask(self.mask)
        if mask.shape != (height, width):
            found = f"{mask.shape[1]} x {mask.shape[0]}"
            raise InputError(f"{name}: the mask has {found} pixels, the frame {size}; give one of the frame's size")
        return dataclasses.replace(self, mask=mask)


def check_prompts(prompts: Iterable[Prompt], num_frames: int, order: Sequence[int] | None = None) -> None:
    """Checks the prompts of a video against each other and against its length.

    Args:
      prompts: The prompts.
      num_frames: Frames of the video.
      order: The frames that are tracked, of which the first one is named in messages; None for all.

    Raises:
      InputError: There is none, or none but corrections; one is in a frame that does not exist; an object has two in a
        frame; or a correction is in a frame that is not tracked, or of an object that is not prompted elsewhere.
    """
    prompts = list(prompts)
    new = [prompt for prompt in prompts if not prompt.correction]
    if not new:
        raise InputError("no prompt to track; give a point, a box or a mask of an object")
    if not num_frames:
        raise InputError("the video has 0 frames; give one with frames")
    prompted = {(prompt.frame, prompt.obj) for prompt in new}
    seen: set[tuple[int, int | str]] = set()
    for prompt in (*new, *(prompt for prompt in prompts if prompt.correction)):
        if not 0 <= prompt.frame < num_frames:
            raise InputError(f"a prompt in frame {prompt.frame}, and the video has {num_frames} frames, counted from 0")
        place = prompt.frame, prompt.obj
        if prompt.correction and place in prompted:
            raise InputError(
                f"object {prompt.obj} was prompted in frame {prompt.frame}; give all its points in that prompt"
            )
        if prompt.correction and all(prompt.obj != obj for _, obj in prompted):
            raise InputError(f"correction of object {prompt.obj}, which was not prompted before; prompt it first")
        if prompt.correction and order is not None and prompt.frame not in order:
            raise InputError(
                f"a correction in frame {prompt.frame}, which tracking from frame {order[0]} does not reach; give "
                "another frame to begin with"
            )
        if place in seen:
            raise InputError(f"object {prompt.obj} has two prompts in frame {prompt.frame}; give their points in one")
        seen.add(place)


def read_mask(source: Any) -> np.ndarray:
    """Reads a mask, [h, w] bool, from an array of bool or numbers (those above 0 count), or from an image."""
    if isinstance(source, np.ndarray) and source.ndim == 2:
        return source > 0
    grey = np.asarray(open_image(source, "mask").load().convert("L"))
    return grey >= (128 if grey.max(initial=0) > 1 else 1)


def input_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Resizes a mask [h, w] bool to the model's input, [size, size] float32 of 0 and 1."""
    rows, columns = (bilinear_matrix(length, size, antialias=True) for length in mask.shape)
    return (rows @ mask.astype(np.float32) @ columns.T >= 0.5).astype(np.float32)


def point_arrays(
    prompts: Sequence[Prompt | None], frame_size: tuple[int, int], image_size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Converts the points and boxes of prompts to tokens.

    Args:
      prompts: A prompt for each object; None, and one with a mask, has none.
      frame_size: Height and width of the frame.
      image_size: Height and width of the model's input.
      length: Tokens of each object; see `num_tokens`.

    Returns:
      Column and row in pixels of the model's input, [objects, length, 2] float32, and labels, [objects, length] int32.
    """
    points = np.zeros((len(prompts), length, 2), np.float32)
    labels = np.full((len(prompts), length), PADDING, np.int32)
    scale = image_size / np.asarray(frame_size[::-1], np.float64)
    for row, prompt in enumerate(prompts):
        found = [] if prompt is None else _tokens(prompt)
        found = [*(found or [(0, 0, NOT_A_POINT)]), (0, 0, NOT_A_POINT)]
        points[row, : len(found)] = np.asarray([token[:2] for token in found], np.float64) * scale
        labels[row, : len(found)] = [token[2] for token in found]
    return points, labels


def num_points(prompt: Prompt | None) -> int:
    """Returns the number of points of a prompt, of which a box has two."""
    return 0 if prompt is None else len(_tokens(prompt))


def num_tokens(prompts: Sequence[Prompt | None]) -> int:
    """Returns a number of tokens that holds each of the prompts: a power of two, so that few programs are compiled."""
    longest = max([1, *map(num_points, prompts)]) + 1
    return 1 << (longest - 1).bit_length()


def _tokens(prompt: Prompt) -> list[tuple[float, float, int]]:
    corners = []
    if prompt.box is not None:
        x0, y0, x1, y1 = prompt.box
        corners = [(x0, y0, FIRST_CORNER), (x1, y1, SECOND_CORNER)]
    return [*corners, *((x, y, int(label)) for x, y, label in prompt.points)]
