"""Draws the objects of an answer: the vectors of its `[SEG]` prompt SAM-2, in an image or in the key frames of a video.

A video is drawn in one of two ways. In "sa2va" the vectors prompt each key frame, and the objects are tracked from
there. In "sa2va_i" (arXiv 2509.19082) key frames are drawn alone, and their masks prompt the SAM-2 that was never
trained further, which tracks them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vl3_jax.checkpoint import load as load_checkpoint
from vl3_jax.checkpoint.sa2va_names import JOINT_LEAVES, SAM2_LEAVES, STOCK_LEAVES
from vl3_jax.checkpoint.sources import CheckpointSource, SourcePart
from vl3_jax.errors import InputError
from vl3_jax.inference.buckets import power_of_two
from vl3_jax.inference.object_tracker import TrackedFrame
from vl3_jax.inference.segmenter import Segmenter
from vl3_jax.processing.images import open_image
from vl3_jax.processing.object_prompts import Prompt
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig
from vl3_jax.sa2va.sa2va_model import draw_objects, object_vectors
from vl3_jax.sa2va.vision_budget import KEY_FRAMES
from vl3_jax.sam2.sam2_model import Sam2

TrackingMode = Literal["sa2va", "sa2va_i"]
KeyFrames = int | Sequence[int]
MODES = ("sa2va", "sa2va_i")


@dataclasses.dataclass(frozen=True)
class MaskDrawer:
    """SAM-2 and the layers in front of it.

    Attributes:
      config: Configuration of the whole model.
      joint_params: Parameters of `text_hidden_fcs`.
      sam2: SAM-2 with the mask decoder that reads vectors.
      stock: SAM-2 with its own mask decoder and settings, for points, boxes and masks, and for "sa2va_i".
    """

    config: Sa2vaConfig
    joint_params: dict[str, Any]
    sam2: Segmenter
    stock: Segmenter

    def vectors(self, hidden: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the vector of each object, [objects, W] float32, from the hidden states of its `[SEG]`."""
        if not hidden:
            return np.zeros((0, self.config.sam2.width), np.float32)
        padded = [*hidden, *[hidden[0]] * (power_of_two(len(hidden)) - len(hidden))]
        vectors = object_vectors(self.config, self.joint_params, jnp.asarray(np.stack(padded)))
        return np.asarray(vectors, np.float32)[: len(hidden)]

    def draw(self, image: Any, vectors: np.ndarray, index: int = 0) -> TrackedFrame:
        """Draws objects in one image, without memory.

        Args:
          image: A PIL image, an array or a file.
          vectors: Vector of each object, [objects, W]; of none, there are no masks.
          index: What to call the frame.
        """
        count, config, pixels = len(vectors), self.config.sam2, open_image(image).load()
        through = config.image_size if config.two_step_masks else None
        if not count:
            return _nothing(index, (pixels.height, pixels.width), config.mask_size, through)
        encoded = self.sam2.encode(pixels)
        padded = np.concatenate([vectors, np.repeat(vectors[:1], power_of_two(count) - count, axis=0)])
        drawn = draw_objects(self.sam2.model, self.sam2.params, encoded.features, jnp.asarray(padded))
        logits, scores, presence = (np.asarray(array, np.float32)[:count] for array in drawn)
        return TrackedFrame(index, tuple(range(1, count + 1)), logits, scores, presence, encoded.size, through)

    def track(
        self,
        frames: Sequence[Any],
        vectors: np.ndarray,
        key_frames: Sequence[int],
        mode: TrackingMode = "sa2va",
        corrections: Sequence[Prompt] = (),
    ) -> Iterator[TrackedFrame]:
        """Draws objects in all frames of a video, one after another.

        Args:
          frames: The frames; they are read where they are needed.
          vectors: Vector of each object, [objects, W]; the objects are numbered from 1.
          key_frames: Indices of the frames that the language model has seen.
          mode: How they are tracked, see above.
          corrections: Clicks that correct what is tracked.

        Yields:
          The objects in each frame.

        Raises:
          InputError: There is no such mode, or a correction cannot be used.
        """
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}; use {' or '.join(MODES)}")
        if not len(vectors):
            through = self.config.sam2.image_size if self.config.sam2.two_step_masks else None
            for index in range(len(frames)):
                image = open_image(frames[index], "frame").load()
                yield _nothing(index, (image.height, image.width), self.config.sam2.mask_size, through)
            return
        if mode == "sa2va":
            prompts = [
                Prompt(frame, number, vector=vector)
                for frame in key_frames
                for number, vector in enumerate(vectors, start=1)
            ]
            yield from self.sam2.track(frames, [*prompts, *corrections])
            return
        drawn = (self.draw(frames[frame], vectors, frame) for frame in key_frames)
        prompts = [
            Prompt(frame.index, number, mask=mask)
            for frame in drawn
            for number, mask in zip(frame.objects, frame.masks, strict=True)
        ]
        yield from self.stock.track(frames, [*prompts, *corrections])


def choose_key_frames(count: int, chosen: KeyFrames | None, mode: TrackingMode) -> list[int]:
    """Returns the frames of a video that the language model sees.

    Args:
      count: Number of frames.
      chosen: How many, the first ones in "sa2va" and evenly spaced ones in "sa2va_i"; or their indices. None is 5.
      mode: How the video is tracked.

    Raises:
      InputError: There is no such frame, or there are none.
    """
    chosen = KEY_FRAMES if chosen is None else chosen
    if isinstance(chosen, int):
        if chosen < 1 or count < 1:
            raise InputError(f"{chosen} key frames of {count} frames; give at least one")
        number = min(chosen, count)
        if mode == "sa2va":
            return list(range(number))
        return np.unique(np.linspace(0, count - 1, number).astype(int)).tolist()
    if not chosen or outside(chosen, count):
        raise InputError(f"key frames {list(chosen)} of a video with {count} frames; give some, counted from 0")
    return sorted(set(chosen))


def outside(indices: Sequence[int], count: int) -> bool:
    """Returns whether an index is none of `count` frames."""
    return any(not 0 <= index < count for index in indices)


def load_drawer(source: CheckpointSource, dtype: Any, mesh: jax.sharding.Mesh | None = None) -> MaskDrawer:
    """Loads what a Sa2VA has beside its language model: weights in float32, whatever the `dtype` of activations."""
    config = source.config
    assert isinstance(config, Sa2vaConfig)
    parts = {prefix: SourcePart(source, config.sam2, *names) for prefix, names in _PARTS.items()}
    params = {
        prefix: load_checkpoint(part, dtype="float32", mesh=mesh).params
        for prefix, part in parts.items()
        if prefix != JOINT_LEAVES
    }
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    joint = load_checkpoint(parts[JOINT_LEAVES], dtype="float32", shardings=everywhere).params
    sam2, stock = params[SAM2_LEAVES], params[SAM2_LEAVES] | params[STOCK_LEAVES]
    return MaskDrawer(
        config,
        joint,
        Segmenter(Sam2(config.sam2, dtype=jnp.dtype(dtype)), sam2),
        Segmenter(Sam2(config.stock_sam2, dtype=jnp.dtype(dtype)), stock),
    )


_PARTS = {SAM2_LEAVES: (SAM2_LEAVES,), STOCK_LEAVES: (STOCK_LEAVES, "decoder/"), JOINT_LEAVES: (JOINT_LEAVES,)}


def _nothing(index: int, size: tuple[int, int], low: int, through: int | None) -> TrackedFrame:
    """Returns a frame without objects."""
    logits, none = np.zeros((0, low, low), np.float32), np.zeros(0, np.float32)
    return TrackedFrame(index, (), logits, none, none, size, through)
