"""SAM-2 for images and videos: points, boxes and masks in, masks out."""

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vl3_jax.checkpoint import load as load_checkpoint
from vl3_jax.checkpoint import open_source
from vl3_jax.checkpoint.sa2va_names import SAM2_LEAVES
from vl3_jax.checkpoint.sources import SourcePart
from vl3_jax.errors import InputError
from vl3_jax.inference.object_tracker import ObjectTracker, TrackedFrame
from vl3_jax.processing.images import open_image
from vl3_jax.processing.object_prompts import Prompt, check_prompts, num_points, num_tokens, point_arrays
from vl3_jax.processing.segmentation_pixels import enlarge_masks, input_pixels
from vl3_jax.processing.video_frames import VideoFrames
from vl3_jax.processing.videos import open_video
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig
from vl3_jax.sam2.mask_decoder import choose_mask
from vl3_jax.sam2.sam2_config import Sam2Config
from vl3_jax.sam2.sam2_model import ImageFeatures, ObjectPrompts, Sam2, apply

CHUNK = 8  # frames that one call of the program tracks


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An image that may be segmented many times.

    Attributes:
      features: Its features.
      size: Its height and width.
    """

    features: ImageFeatures
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """Masks of one object, the best first.

    Attributes:
      masks: Masks at the size of the image, [masks, height, width] bool.
      scores: Predicted IoU of each, [masks].
      logits: Low-resolution logits of each, [masks, low, low]; one of them may prompt the next call.
      presence: Logit of the object being in the image.
    """

    masks: np.ndarray
    scores: np.ndarray
    logits: np.ndarray
    presence: float


class Segmenter:
    """A loaded SAM-2.

    Attributes:
      model: The model.
      params: Its parameters, on the devices.
    """

    def __init__(self, model: Sam2, params: dict):
        self.model, self.params = model, params

    def encode(self, image: Any) -> EncodedImage:
        """Encodes an image: a path, bytes, a PIL image or an array."""
        pixels, config = open_image(image).load(), self.model.config
        inputs = input_pixels(pixels, config.image_size, config.resample)[None]
        return EncodedImage(_encode(self.model, self.params, inputs), (pixels.height, pixels.width))

    def segment(
        self,
        image: Any,
        points: Sequence[Sequence[float]] = (),
        box: Sequence[float] | None = None,
        logits: np.ndarray | None = None,
        multimask: bool | None = None,
    ) -> Segmentation:
        """Segments one object of an image.

        Args:
          image: A path, bytes, a PIL image, an array, or the result of `encode`.
          points: Column and row of each point in pixels of the image, and its label: 1 (the default) on the object, 0
            beside it.
          box: Corners of a box around the object: x0, y0, x1, y1.
          logits: Low-resolution logits of an earlier call, [low, low], which these prompts correct.
          multimask: Whether to return three masks of different extent instead of one; by default, where the prompt is
            a single point.

        Raises:
          InputError: The image cannot be read, or a prompt lies outside it.
        """
        config = self.model.config
        encoded = image if isinstance(image, EncodedImage) else self.encode(image)
        labelled = tuple((point[0], point[1], int(point[2]) if len(point) > 2 else 1) for point in points)
        prompt = Prompt(points=labelled, box=box)
        if logits is None or labelled or box is not None:
            prompt = prompt.checked(*encoded.size)
        low = (config.mask_size, config.mask_size)
        if logits is not None and np.shape(logits) != low:
            raise InputError(f"logits have the shape {np.shape(logits)}; give those of an earlier call, {low}")
        arrays = point_arrays([prompt], encoded.size, config.image_size, num_tokens([prompt]))
        multimask = num_points(prompt) <= config.max_points if multimask is None else multimask
        prompts = ObjectPrompts(*map(jnp.asarray, (*arrays, [multimask])))
        mask = None if logits is None else np.asarray(logits, np.float32)[None]
        masks, scores, presence = jax.device_get(_segment(self.model, self.params, encoded.features, prompts, mask))
        order = np.argsort(-scores[0, 1:]) + 1 if multimask else np.array([0])
        through = config.image_size if config.two_step_masks else None
        full = enlarge_masks(masks[0, order], encoded.size, through) > 0
        return Segmentation(full, scores[0, order], masks[0, order], float(presence[0]))

    def tracker(self, *, num_frames: int | None = None, reverse: bool = False) -> ObjectTracker:
        """Starts tracking frames as they come, such as those of a camera."""
        return ObjectTracker(self.model, self.params, num_frames=num_frames, reverse=reverse)

    def track(
        self,
        frames: Any,
        prompts: Iterable[Prompt],
        *,
        start: int | None = None,
        reverse: bool = False,
        chunk: int = CHUNK,
    ) -> Iterator[TrackedFrame]:
        """Tracks objects through a video.

        Args:
          frames: A video: a file or a folder of frames. Or frames: PIL images, arrays [h, w, 3] or files. A sequence
            is read where it is needed. From an iterator, one frame is read at a time; prompts of later frames then
            count from those frames on.
          prompts: Prompts in any frame. Those that are corrections apply to frames in which the object is tracked.
          start: Frame to begin with; by default the first one, or with `reverse` the last one.
          reverse: Whether to go from `start` to the first frame.
          chunk: Frames that one call of the program tracks.

        Yields:
          The objects in each frame.

        Raises:
          InputError: There are no frames or prompts, or one of them cannot be used.
        """
        prompts = list(prompts)
        if isinstance(frames, str | os.PathLike | bytes):
            frames = VideoFrames(open_video(frames))
        if isinstance(frames, Sequence | np.ndarray):
            yield from self._track_sequence(frames, prompts, start, reverse, chunk)
        elif reverse or start:
            raise InputError("frames of an iterator are tracked from the first one on; give a sequence")
        else:
            yield from self._track_stream(frames, prompts)

    def _track_sequence(self, frames, prompts: list[Prompt], start: int | None, reverse: bool, chunk: int):
        count = len(frames)
        start = (count - 1 if reverse else 0) if start is None else start
        if count and not 0 <= start < count:
            raise InputError(f"frame {start} to begin with, and the video has {count} frames; give another")
        order = range(start, -1, -1) if reverse else range(start, count)
        check_prompts(prompts, count, order)
        new, corrections = _divided(prompts)
        tracker = self.tracker(num_frames=count, reverse=reverse)
        for index, own in itertools.groupby(sorted(new, key=lambda prompt: prompt.frame), lambda prompt: prompt.frame):
            tracker.prompt(frames[index], own)
        length = min(chunk, len(order))
        for first in range(0, len(order), length):
            indices = order[first : first + length]
            own = [prompt for prompt in corrections if prompt.frame in indices]
            yield from tracker.step([frames[index] for index in indices], indices, own, pad_to=length)

    def _track_stream(self, frames: Iterable[Any], prompts: list[Prompt]) -> Iterator[TrackedFrame]:
        (new, corrections), tracker, index = _divided(prompts), self.tracker(), -1
        check_prompts(prompts, sys.maxsize)
        for index, frame in enumerate(frames):
            tracker.prompt(frame, [prompt for prompt in new if prompt.frame == index])
            if tracker.objects:
                yield from tracker.step([frame], [index], [prompt for prompt in corrections if prompt.frame == index])
        check_prompts(prompts, index + 1)


def load_segmenter(
    source: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Any = None,
    token: str | None = None,
    quiet: bool = True,
) -> Segmenter:
    """Loads SAM-2 from a checkpoint of any kind.

    Args:
      source: Folder of transformers or of Meta, file of Meta, Orbax folder, or Hub id; of a Sa2VA its SAM-2 is taken.
      dtype: Dtype of weights and activations; by default that of the checkpoint.
      mesh: Mesh to shard the parameters over.
      token: Hub token.
      quiet: Whether to hide the progress bar.

    Raises:
      InputError: There is no such checkpoint, or it is another model.
    """
    opened = open_source(source, token=token)
    if isinstance(opened.config, Sa2vaConfig):
        opened = SourcePart(opened, opened.config.sam2, SAM2_LEAVES)
    if not isinstance(opened.config, Sam2Config):
        raise InputError(f"{source}: holds a model that chats ({opened.kind}); give one of SAM-2")
    params = load_checkpoint(opened, dtype=dtype, mesh=mesh, quiet=quiet).params
    return Segmenter(Sam2(opened.config, dtype=jax.tree.leaves(params)[0].dtype), params)


def _divided(prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Returns the prompts that make conditioning frames, and the corrections."""
    return [p for p in prompts if not p.correction], [p for p in prompts if p.correction]


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: Sam2, params: dict, pixels) -> ImageFeatures:
    return apply(model, params, "encode_image", pixels)


@functools.partial(jax.jit, static_argnums=0)
def _segment(model: Sam2, params: dict, features: ImageFeatures, prompts: ObjectPrompts, masks):
    """Returns logits, IoUs and presence; those of the single mask, see `choose_mask`, come before the other three."""
    decoded = apply(model, params, "segment", features, prompts, masks)
    single = choose_mask(model.config, decoded, jnp.zeros_like(prompts.ambiguous))
    return decoded.masks.at[:, 0].set(single.mask), decoded.scores.at[:, 0].set(single.score), decoded.presence
