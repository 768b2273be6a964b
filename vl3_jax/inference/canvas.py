"""What the objects of an answer are drawn in: images, or the frames of one video."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.inference.mask_drawer import MaskDrawer, TrackingMode, choose_key_frames
from vl3_jax.inference.object_tracker import TrackedFrame
from vl3_jax.processing.messages import Turn
from vl3_jax.processing.object_prompts import Prompt
from vl3_jax.processing.processor import ProcessorOutput, open_media
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.video_frames import VideoFrames
from vl3_jax.processing.video_reader import VideoReader


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Canvas:
    """Images, each of which is drawn in alone, or frames of a video, through which objects are tracked.

    Attributes:
      opened: Opens them, when something is drawn.
      key_frames: Of a video, the frames that the language model has seen first, by their place; None of images.
      mode: How a video is tracked; see `vl3_jax.inference.mask_drawer`.
      indices: Index of each frame in its video; None where all of them are there, and of images.
    """

    opened: Callable[[], Sequence[Any]]
    key_frames: Sequence[int] | None = None
    mode: TrackingMode = "sa2va"
    indices: Sequence[int] | None = None

    @functools.cached_property
    def frames(self) -> Sequence[Any]:
        """The images or frames.

        Raises:
          InputError: One cannot be read any more.
        """
        return self.opened()

    def draw(
        self, drawer: MaskDrawer, vectors: np.ndarray, corrections: Sequence[Prompt] = ()
    ) -> Iterator[TrackedFrame]:
        """Yields the objects in each image, which are counted from 0, or in each frame.

        Args:
          drawer: What draws them.
          vectors: Vector of each object, [objects, W].
          corrections: Clicks in frames of the video that correct what is tracked.

        Raises:
          InputError: A correction cannot be used, or an image cannot be read.
        """
        if self.key_frames is None:
            if corrections:
                raise InputError("corrections belong to a video; prompt an image with points and logits")
            yield from (drawer.draw(image, vectors, number) for number, image in enumerate(self.frames))
            return
        placed = [dataclasses.replace(prompt, frame=self._place(prompt.frame)) for prompt in corrections]
        for frame in drawer.track(self.frames, vectors, self.key_frames, self.mode, placed):
            yield frame if self.indices is None else dataclasses.replace(frame, index=self.indices[frame.index])

    def _place(self, index: int) -> int:
        """Returns the place of a frame of the video."""
        if self.indices is None:
            return index
        if index not in self.indices:
            raise InputError(f"a correction in frame {index}, which the model has not seen; correct one that it has")
        return self.indices.index(index)


def canvas_of(turns: Sequence[Turn], processed: ProcessorOutput, config: ProcessorConfig) -> Canvas | None:
    """Returns what the objects that a conversation names are drawn in: its images, or the frames shown of its video.

    Args:
      turns: The conversation, with sources that can be opened once more.
      processed: Its prompt.
      config: Settings that the prompt was made with.

    Returns:
      The canvas; None where there is no image or video, or a video and something else.
    """
    media = [part for turn in turns for part in turn.media]
    if media and all(part.kind == "image" for part in media):
        return Canvas(lambda: [part.source for part in media])
    if len(media) != 1:
        return None
    indices = list(dict.fromkeys(processed.videos[0].indices))

    def opened() -> VideoFrames:
        reader = open_media(media[0], config)
        assert isinstance(reader, VideoReader)
        return VideoFrames(reader, indices)

    return Canvas(opened, choose_key_frames(len(indices), None, "sa2va"), indices=indices)
