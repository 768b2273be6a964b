"""An answer with its objects."""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.inference.canvas import Canvas
from vl3_jax.inference.chat_model import GenerationOutput
from vl3_jax.inference.mask_drawer import MaskDrawer
from vl3_jax.inference.object_tracker import TrackedFrame
from vl3_jax.processing.mask_files import mask_entry
from vl3_jax.processing.object_prompts import Prompt
from vl3_jax.sa2va.grounded_text import GroundedText

logger = logging.getLogger(__name__)
_NO_CANVAS = "objects are drawn in images or in one video; give the one or the other"


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class GroundedOutput(GenerationOutput):
    """An answer with its objects, which are drawn when they are asked for.

    Attributes:
      grounded: Its text with tags, and which objects it names in which words.
      vectors: Vector of each object, [objects, W] float32.
      canvas: What they are drawn in; None where the conversation has nothing of the kind.
      drawer: What draws them.
    """

    grounded: GroundedText
    vectors: np.ndarray
    canvas: Canvas | None
    drawer: MaskDrawer

    @property
    def names(self) -> list[str]:
        """The phrase of each object; its number, from 1, where it has none, a number, or that of another object."""
        phrases = [named.phrase for named in self.grounded.objects]
        unique = [
            phrase if phrase and phrases.count(phrase) == 1 and not phrase.isdecimal() else None for phrase in phrases
        ]
        return [phrase or str(number) for number, phrase in enumerate(unique, start=1)]

    def frames(self, corrections: Sequence[Prompt] = ()) -> Iterator[TrackedFrame]:
        """Yields the objects in each image, or in each frame of the video; they are numbered from 1.

        Args:
          corrections: Clicks in frames of the video that correct what is tracked.

        Raises:
          InputError: There is nothing to draw in, or a correction cannot be used.
        """
        if self.canvas is None:
            raise InputError(_NO_CANVAS)
        return self.canvas.draw(self.drawer, self.vectors, corrections)

    @functools.cached_property
    def masks(self) -> np.ndarray:
        """Masks of the objects in an image, [objects, height, width] bool.

        Of a video, and of several images of one size, [frames, objects, height, width].
        """
        masks = [frame.masks for frame in self.frames()]
        if len({mask.shape for mask in masks}) > 1:
            raise InputError("the images differ in size, so that one array cannot hold their masks; use frames()")
        alone = len(masks) == 1 and self.canvas is not None and self.canvas.key_frames is None
        return masks[0] if alone else np.stack(masks)

    @property
    def mask(self) -> np.ndarray:
        """All objects together, without their axis: an answer without `[SEG]` has an empty mask."""
        return np.asarray(self.masks.any(-3))

    def as_json(self) -> dict[str, Any]:
        """Returns the object that `vl3 ask --json` prints, with `masks` by object and frame where there are objects."""
        described = super().as_json()
        if not self.grounded.objects:
            return described
        if self.canvas is None:
            logger.warning("the answer names %d objects, which are not drawn: %s", len(self.names), _NO_CANVAS)
            return described
        masks: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        for frame in self.frames():
            for name, *found in zip(self.names, frame.masks, frame.scores, frame.presence, strict=True):
                masks[name][str(frame.index)] = mask_entry(*found)
        return described | {"masks": masks}
