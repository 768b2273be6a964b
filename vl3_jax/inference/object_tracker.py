"""Tracks objects through frames as they come, with a memory of fixed size."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing.images import open_image
from vl3_jax.processing.object_prompts import Prompt, input_mask, num_points, num_tokens, point_arrays
from vl3_jax.processing.segmentation_pixels import enlarge_masks, input_pixels
from vl3_jax.sam2.memory_bank import MEMORY_DTYPE, ConditioningFrames, RecentFrames
from vl3_jax.sam2.sam2_model import ObjectOutput, ObjectPrompts, Sam2
from vl3_jax.sam2.tracking import FrameInputs, condition, track_frames


@dataclasses.dataclass(frozen=True)
class TrackedFrame:
    """The objects in a frame.

    Attributes:
      index: Index of the frame.
      objects: Number or name of each object.
      logits: Low-resolution logits of each object, [objects, low, low] float32.
      scores: Predicted IoU of each mask, [objects].
      presence: Logit of each object being in the frame, [objects].
      size: Height and width of the frame.
      through: Size that masks pass through; see `enlarge_masks`.
    """

    index: int
    objects: tuple[int | str, ...]
    logits: np.ndarray
    scores: np.ndarray
    presence: np.ndarray
    size: tuple[int, int]
    through: int | None = None

    @property
    def masks(self) -> np.ndarray:
        """Masks at the size of the frame, [objects, height, width] bool."""
        masks = np.empty((len(self.logits), *self.size), bool)
        for mask, logits in zip(masks, self.logits, strict=True):  # one by one: logits of this size take much memory
            np.greater(enlarge_masks(logits, self.size, self.through), 0, out=mask)
        return masks


class ObjectTracker:
    """Follows objects through the frames of a video, in either direction.

    Frames are given one after another, or a few at once; what is remembered has a fixed size. The first prompt of an
    object may come with any frame. All objects are followed in one batch, padded to one of few sizes.
    """

    def __init__(self, model: Sam2, params: dict, *, num_frames: int | None = None, reverse: bool = False):
        """Starts without objects.

        Args:
          model: The model.
          params: Its parameters.
          num_frames: Length of the video, which SAM 2.1 measures distances in time by; None for a stream.
          reverse: Whether frames come with decreasing indices.
        """
        self._model, self._params, self._direction = model, params, -1 if reverse else 1
        pointers = model.config.num_pointers
        self._longest = np.float32(min(num_frames or pointers, pointers) - 1)
        self._rows: dict[int | str, int] = {}
        self._entries: dict[int, dict[int, Any]] = collections.defaultdict(dict)  # by row, then by index of the frame
        self._conditioning: ConditioningFrames | None = None
        self._recent = self._before = RecentFrames.empty(model.config, 1, model.dtype)
        self._last: tuple[int, Image.Image] | None = None

    @property
    def objects(self) -> tuple[int | str, ...]:
        """The numbers or names of the objects, in the order of their first prompts."""
        return tuple(self._rows)

    def prompt(self, frame: Any, prompts: Iterable[Prompt]) -> None:
        """Prompts objects in a frame, which becomes a conditioning frame of theirs; it need not be the next one.

        Args:
          frame: The frame that the prompts are in: a PIL image, an array [h, w, 3], or a file.
          prompts: Prompts in this frame, one for each object.

        Raises:
          InputError: A prompt cannot be used; see `Prompt.checked`.
        """
        image = open_image(frame, "frame").load()
        own = self._by_object(image, prompts)
        if not own:
            return
        for obj in own:
            self._rows.setdefault(obj, len(self._rows))
        size, count = self._model.config.image_size, _padded(len(own))
        listed = [*own.values(), *[None] * (count - len(own))]
        masks = np.zeros((count, size, size), np.float32)
        masked = np.array([prompt is not None and prompt.mask is not None for prompt in listed])
        for row in np.flatnonzero(masked):
            masks[row] = input_mask(listed[row].mask, size)
        arguments = self._pixels([image]), self._prompts(listed, image, self._model.config.multimask), masks, masked
        memory, output = condition(self._model, self._params, *arguments)
        for row, (obj, prompt) in enumerate(own.items()):
            entry = memory[row], jax.tree.map(lambda x, row=row: x[row], output)
            self._entries[self._rows[obj]][prompt.frame] = entry
        self._conditioning = None

    def step(
        self, frames: Sequence[Any], indices: Sequence[int], corrections: Iterable[Prompt] = (), pad_to: int = 1
    ) -> list[TrackedFrame]:
        """Finds the objects in the next frames.

        Args:
          frames: PIL images, arrays [h, w, 3], or files.
          indices: Index of each frame.
          corrections: Clicks in these frames that correct the tracked masks.
          pad_to: The frames are processed as if there were so many, so that one program serves all calls.

        Raises:
          InputError: There is no object yet, or a correction cannot be used.
        """
        images = [open_image(frame, "frame").load() for frame in frames]
        if not self._rows:
            raise InputError("no object to track; prompt one first")
        self._grow()
        corrections = list(corrections)
        found = [
            self._by_object(image, [prompt for prompt in corrections if prompt.frame == index])
            for image, index in zip(images, indices, strict=True)
        ]
        for index, own in zip(indices, found, strict=True):
            for obj in own:
                if obj not in self._rows:
                    raise InputError(f"correction of object {obj}, which was not prompted before; prompt it first")
                if index in self._entries[self._rows[obj]]:
                    raise InputError(f"object {obj} was prompted in frame {index}; give all its points in that prompt")
        self._before = self._recent
        inputs = self._inputs(images, indices, found, max(pad_to, len(images)))
        arguments = self._bank(), self._recent, inputs, self._longest
        pixels = self._pixels([*images, *[images[-1]] * (len(inputs.clock) - len(images))])
        self._recent, output = track_frames(self._model, self._params, pixels, *arguments)
        self._last = (indices[0], images[0]) if len(images) == 1 else None
        return self._frames(jax.device_get(output), images, indices)

    def correct(self, corrections: Iterable[Prompt]) -> TrackedFrame:
        """Finds the objects in the frame that came last once more, with correction clicks.

        Raises:
          InputError: The last step had several frames, or a correction cannot be used.
        """
        if self._last is None:
            raise InputError("no frame to correct; track frames one at a time")
        index, image = self._last
        self._recent = self._before
        corrections = [dataclasses.replace(prompt, frame=index) for prompt in corrections]
        return self.step([image], [index], corrections)[0]

    def _by_object(self, image: Image.Image, prompts: Iterable[Prompt]) -> dict[int | str, Prompt]:
        own: dict[int | str, Prompt] = {}
        for prompt in prompts:
            if prompt.obj in own:
                raise InputError(
                    f"object {prompt.obj} has two prompts in frame {prompt.frame}; give their points in one"
                )
            own[prompt.obj] = prompt.checked(image.height, image.width)
        return own

    def _pixels(self, images: Sequence[Image.Image]) -> np.ndarray:
        config = self._model.config
        return np.stack([input_pixels(image, config.image_size, config.resample) for image in images])

    def _prompts(
        self, prompts: Sequence[Prompt | None], image: Image.Image, multimask: bool, tokens: int = 0
    ) -> ObjectPrompts:
        config = self._model.config
        length = max(tokens, num_tokens(prompts))
        arrays = point_arrays(prompts, (image.height, image.width), config.image_size, length)
        ambiguous = [multimask and num_points(prompt) <= config.max_points for prompt in prompts]
        made = ObjectPrompts(*map(jnp.asarray, (*arrays, ambiguous)))
        said = [None if prompt is None else prompt.vector for prompt in prompts]
        if all(vector is None for vector in said):
            return made
        vectors = [np.zeros(config.width, np.float32) if vector is None else vector for vector in said]
        valid = np.array([[vector is not None] for vector in said])
        return made.replace(vectors=jnp.asarray(np.stack(vectors)[:, None]), vectors_valid=jnp.asarray(valid))

    def _inputs(self, images, indices, found: list[dict[int | str, Prompt]], length: int) -> FrameInputs:
        """Stacks clocks and corrections of the frames, padded to `length`."""
        config, rows = self._model.config, self._recent.valid.shape[0]
        listed: list[list[Prompt | None]] = [[None] * rows for _ in range(length)]
        for own, frame in zip(found, listed, strict=False):
            for obj, prompt in own.items():
                frame[self._rows[obj]] = prompt
        multimask, tokens = config.multimask and config.multimask_tracking, max(map(num_tokens, listed))
        padded = [*images, *[images[-1]] * (length - len(images))]
        each = [self._prompts(own, image, multimask, tokens) for own, image in zip(listed, padded, strict=True)]
        clocks = self._direction * jnp.asarray([*indices, *[indices[-1]] * (length - len(indices))])
        corrected = jnp.array([[prompt is not None for prompt in own] for own in listed])
        corrections = jax.tree.map(lambda *x: jnp.stack(x), *each)
        return FrameInputs(clocks, jnp.arange(length) < len(images), corrections, corrected)

    def _grow(self) -> None:
        """Makes room for objects that were prompted since."""
        rows = _padded(len(self._rows))
        if missing := rows - self._recent.valid.shape[0]:
            new = RecentFrames.empty(self._model.config, missing, self._model.dtype)
            self._recent = jax.tree.map(lambda old, more: jnp.concatenate([old, more]), self._recent, new)

    def _bank(self) -> ConditioningFrames:
        """Returns the conditioning frames of all objects, padded to one of few numbers for each."""
        if self._conditioning is None:
            config, dtype = self._model.config, self._model.dtype
            rows, slots = self._recent.valid.shape[0], _padded(max(map(len, self._entries.values())))
            memory = jnp.zeros((config.grid**2, config.memory_width), MEMORY_DTYPE)
            mask = jnp.zeros((config.mask_size, config.mask_size))
            nothing = ObjectOutput(mask, jnp.zeros(()), jnp.zeros(()), jnp.zeros(config.width, dtype))
            clock, valid = np.zeros((rows, slots), np.int32), np.zeros((rows, slots), bool)
            table = [[(memory, nothing)] * slots for _ in range(rows)]
            for row, entries in self._entries.items():
                for slot, (index, entry) in enumerate(entries.items()):
                    table[row][slot], clock[row, slot], valid[row, slot] = entry, self._direction * index, True
            stacked = [jax.tree.map(lambda *x: jnp.stack(x), *entries) for entries in table]
            memory, output = jax.tree.map(lambda *x: jnp.stack(x), *stacked)
            self._conditioning = ConditioningFrames(memory, output, jnp.asarray(clock), jnp.asarray(valid))
        return self._conditioning

    def _frames(self, output: ObjectOutput, images: Sequence[Image.Image], indices) -> list[TrackedFrame]:
        config, count = self._model.config, len(self._rows)
        through = config.image_size if config.two_step_masks else None
        found = []
        for number, (image, index) in enumerate(zip(images, indices, strict=True)):
            logits, scores, presence = (
                np.asarray(x)[number, :count] for x in (output.mask, output.score, output.presence)
            )
            size = image.height, image.width
            found.append(TrackedFrame(index, self.objects, logits, scores, presence, size, through))
        return found


def _padded(count: int) -> int:
    """Returns the next of 1 to 8, 10, 12, 14, 16, 20, ...: few sizes, of which at most a quarter is padding."""
    step = 1 << max((count - 1).bit_length() - 3, 0)
    return max(-(-count // step) * step, 1)
