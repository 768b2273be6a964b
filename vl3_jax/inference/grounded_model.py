"""The interface of a model whose answers draw objects: an image or a video and a text in, text and masks out."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.inference.answer_settings import AnswerSettings
from vl3_jax.inference.canvas import Canvas, canvas_of
from vl3_jax.inference.chat_model import ChatModel, GenerationOutput
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.generation_config import GenerationConfig
from vl3_jax.inference.grounded_output import GroundedOutput
from vl3_jax.inference.mask_drawer import KeyFrames, MaskDrawer, TrackingMode, choose_key_frames
from vl3_jax.processing.images import open_image
from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.processing.object_prompts import read_mask
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.video_frames import VideoFrames
from vl3_jax.processing.videos import open_video
from vl3_jax.sa2va.grounded_text import read_grounded
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

    @property
    def canvas(self) -> Canvas:
        """What is drawn in."""
        return Canvas(lambda: self.frames, None if self.video is None else self.seen, self.mode)

    def turn(self) -> Turn:
        """Returns the message: the key frames as images, then the text."""
        if not self.text.strip():
            raise InputError("nothing to draw: give a phrase or a request")
        text = self.text if self.verbatim else mask_request(self.text, self.video is not None)
        return Turn("user", [*(MediaPart("image", self.frames[index]) for index in self.seen), text])


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
        answers = self._answers(
            [[request.turn()] for request in requests],
            [self._drawing_settings(settings, request.video is not None) for request in requests],
        )
        pairs = zip(requests, answers, strict=True)
        return [dataclasses.replace(answer, canvas=request.canvas) for request, answer in pairs]

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
        return self._answers([[turn]], [self._drawing_settings(settings)])[0].text

    def _drawing_settings(self, keywords: Mapping[str, Any], video: bool = False) -> AnswerSettings:
        """Returns the settings of an answer about an image, or key frames of a video, from the keywords of `chat`."""
        config = drawing_processor(self.processor.config, video, keywords.get("max_visual_tokens"))
        return self.resolve(config, **keywords)

    def _completed(self, turns: Sequence[Turn], settings: AnswerSettings, answer: GenerationOutput) -> GroundedOutput:
        grounded = read_grounded(answer.token_ids, self.processor.tokenizer)
        read = tuple(
            named for named in grounded.objects if named.place in answer.hidden
        )  # not all, if it was cancelled
        return GroundedOutput(
            **vars(answer),
            grounded=dataclasses.replace(grounded, objects=read),
            vectors=self.drawer.vectors([answer.hidden[named.place] for named in read]),
            canvas=canvas_of(turns, answer.processed, settings.processor),
            drawer=self.drawer,
        )
