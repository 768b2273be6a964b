"""The interface of a model whose answers draw objects: an image or a video and a text in, text and masks out."""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.inference.buckets import power_of_two
from vl3_jax.inference.chat_model import MOST_ROWS, ChatModel, GenerationOutput
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.generation_config import GenerationConfig
from vl3_jax.inference.mask_drawer import KeyFrames, MaskDrawer, TrackingMode, choose_key_frames
from vl3_jax.inference.object_tracker import TrackedFrame
from vl3_jax.processing.images import open_image
from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.processing.object_prompts import Prompt, read_mask
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.video_frames import VideoFrames
from vl3_jax.processing.videos import open_video
from vl3_jax.sa2va.grounded_text import GroundedText, read_grounded
from vl3_jax.sa2va.templates import DESCRIBE, mask_request, region_request
from vl3_jax.sa2va.vision_budget import drawing_processor


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MaskRequest:
    """What is to be drawn.

    Attributes:
      text: A phrase, a question or a request; see `vl3_jax.sa2va.templates.mask_request`.
      image: An image: path, bytes, PIL image or array.
      video: Instead, a video: a file, a folder of frames, or a sequence of frames.
      key_frames: Frames of the video that the language model sees, their number or indices; None is 5.
      mode: How a video is tracked, "sa2va" or "sa2va_i"; see `vl3_jax.inference.mask_drawer`.
      verbatim: Whether the text is sent as it is, whatever it says.
    """

    text: str
    image: Any = None
    video: Any = None
    key_frames: KeyFrames | None = None
    mode: TrackingMode = "sa2va"
    verbatim: bool = False

    @functools.cached_property
    def frames(self) -> Sequence[Any]:
        """The frames of the video, or the one image.

        Raises:
          InputError: There is neither, or both, or it cannot be read.
        """
        if (self.image is None) == (self.video is None):
            raise InputError("masks are drawn in one image or one video; give one of them")
        if self.image is not None:
            return [open_image(self.image).load()]
        if isinstance(self.video, str | os.PathLike | bytes):
            return VideoFrames(open_video(self.video))
        return self.video

    @functools.cached_property
    def seen(self) -> list[int]:
        """Indices of the frames that the language model sees."""
        return [0] if self.video is None else choose_key_frames(len(self.frames), self.key_frames, self.mode)

    def turn(self) -> Turn:
        """Returns the message: the key frames as images, then the text."""
        if not self.text.strip():
            raise InputError("nothing to draw: give a phrase or a request")
        text = self.text if self.verbatim else mask_request(self.text, self.video is not None)
        return Turn("user", [*(MediaPart("image", self.frames[index]) for index in self.seen), text])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GroundedOutput:
    """An answer with its objects, which are drawn when they are asked for.

    Attributes:
      request: What was asked.
      answer: The answer with the statistics of its generation.
      grounded: Its text, and which objects it names in which words.
      vectors: Vector of each object, [objects, W] float32.
      drawer: What draws them.
    """

    request: MaskRequest
    answer: GenerationOutput
    grounded: GroundedText
    vectors: np.ndarray
    drawer: MaskDrawer

    @property
    def text(self) -> str:
        """The answer with its tags."""
        return self.grounded.text

    @property
    def names(self) -> list[str]:
        """The phrase of each object; its number, from 1, where it has none, a number, or that of another object."""
        phrases = [named.phrase for named in self.grounded.objects]
        unique = [
            phrase if phrase and phrases.count(phrase) == 1 and not phrase.isdecimal() else None for phrase in phrases
        ]
        return [phrase or str(number) for number, phrase in enumerate(unique, start=1)]

    def frames(self, corrections: Sequence[Prompt] = ()) -> Iterator[TrackedFrame]:
        """Yields the objects in the image, or in each frame of the video; they are numbered from 1.

        Args:
          corrections: Clicks in frames of the video that correct what is tracked.

        Raises:
          InputError: A correction cannot be used.
        """
        request = self.request
        if request.video is None:
            if corrections:
                raise InputError("corrections belong to a video; prompt an image with points and logits")
            yield self.drawer.draw(request.frames[0], self.vectors)
            return
        yield from self.drawer.track(request.frames, self.vectors, request.seen, request.mode, corrections)

    @functools.cached_property
    def masks(self) -> np.ndarray:
        """Masks of the objects in an image, [objects, height, width] bool, or of a video, [frames, objects, ...]."""
        masks = [frame.masks for frame in self.frames()]
        return masks[0] if self.request.video is None else np.stack(masks)

    @property
    def mask(self) -> np.ndarray:
        """All objects together, without their axis: an answer without `[SEG]` has an empty mask."""
        return np.asarray(self.masks.any(-3))


class GroundedModel(ChatModel):
    """A chat model that draws objects, too.

    Attributes:
      drawer: SAM-2 and what joins it with the language model; `drawer.stock` takes points, boxes and masks.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        generation_config: GenerationConfig,
        drawer: MaskDrawer,
        load_seconds: float = 0.0,
    ):
        super().__init__(engine, processor, generation_config, load_seconds)
        self.drawer = drawer

    def segment(
        self,
        text: str,
        *,
        image: Any = None,
        video: Any = None,
        key_frames: KeyFrames | None = None,
        mode: TrackingMode = "sa2va",
        verbatim: bool = False,
        **settings: Any,
    ) -> GroundedOutput:
        """Answers a text about an image or a video with masks.

        Args:
          text: As of `MaskRequest`, like the arguments that follow.
          image: An image.
          video: Instead, a video.
          key_frames: Frames of the video that the language model sees.
          mode: How the video is tracked.
          verbatim: Whether the text is sent as it is.
          **settings: The settings of `chat`.

        Raises:
          InputError: As `chat`, or there is nothing to draw in.
        """
        return self.segment_batch([MaskRequest(text, image, video, key_frames, mode, verbatim)], **settings)[0]

    def segment_batch(self, requests: Sequence[MaskRequest], **settings: Any) -> list[GroundedOutput]:
        """Answers several requests side by side.

        Args:
          requests: The requests.
          **settings: The settings of `chat`.

        Raises:
          InputError: As `segment`.
        """
        answers = self._grounded_answers(
            [[request.turn()] for request in requests],
            [request.video is not None for request in requests],
            settings,
        )
        results = []
        for request, (answer, hidden) in zip(requests, answers, strict=True):
            grounded = read_grounded(answer.token_ids, self.processor.tokenizer)
            states = [hidden[named.place] for named in grounded.objects]
            results.append(GroundedOutput(request, answer, grounded, self.drawer.vectors(states), self.drawer))
        return results

    def describe(self, image: Any, masks: Sequence[Any], question: str = DESCRIBE, **settings: Any) -> str:
        """Answers a question about regions of an image.

        Args:
          image: The image.
          masks: Mask of each region, at any size: an array [h, w], or an image file.
          question: The question, which calls them region1, region2, ...
          **settings: The settings of `chat`.

        Raises:
          InputError: As `chat`, or a region is empty.
        """
        parts = region_request([read_mask(mask) for mask in masks], question)
        turn = Turn("user", [MediaPart("image", image), *parts])
        return self._grounded_answers([[turn]], [False], settings)[0][0].text

    def _grounded_answers(
        self, conversations: Sequence[list[Turn]], of_videos: Sequence[bool], settings: dict[str, Any]
    ) -> list[tuple[GenerationOutput, dict[int, np.ndarray]]]:
        """Answers conversations side by side; returns the hidden states of each `[SEG]` beside each answer."""
        most = settings.get("max_visual_tokens")
        self.engine.reserve(rows=min(power_of_two(len(conversations)), MOST_ROWS))
        running = []
        try:
            for turns, video in zip(conversations, of_videos, strict=True):
                start = time.perf_counter()
                resolved = self.resolve(drawing_processor(self.processor.config, video, most), **settings)
                prompt = self.read(turns, resolved)
                running.append(self._submit(prompt, resolved, time.perf_counter() - start, streams=False))
            return [(answering.result(), answering.generation.hidden) for answering in running]
        finally:
            for answering in running:  # after Ctrl-C or an error; the complete ones stay as they are
                answering.cancel()
