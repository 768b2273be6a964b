"""The processor: converts a conversation with images and videos to one sample of the packed batch.

processor = Processor.from_folder("checkpoint")
processed = processor([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, "What happens?"]}])
processed.sample                                      # input of packed_batch.pack
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing import (
    chat_template,
    images,
    loss_weights,
    messages,
    patchify,
    pruning,
    region_cells,
    resize,
    saved_frames,
    videos,
)
from vl3_jax.processing.frame_selection import FrameSelection
from vl3_jax.processing.media_cache import MediaCache
from vl3_jax.processing.packed_batch import PATCH_DIM, Sample, Visual
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.resize import PATCH
from vl3_jax.processing.tokenizer import Tokenizer
from vl3_jax.processing.video_reader import FrameSamplingOptions, PlanChangedError, VideoReader

_MAX_PENDING = 8  # frames that wait to be resized

MediaReader = images.ImageReader | VideoReader


@dataclasses.dataclass(frozen=True)
class DecodedMedia:
    """The images and videos of a conversation, resized, cut into patches and pruned.

    Attributes:
      visuals: Patches of each image and video, in order of appearance.
      token_counts: Vision tokens of each image and video, as the chat template needs them.
      selections: The frames of each video that the model sees, None for an image; in order of appearance.
      warnings: Messages for the user about damaged or reduced media, one line each.
      prune_threshold: The threshold that videos were pruned with, None if they were not.
    """

    visuals: list[Visual]
    token_counts: list[chat_template.VisualTokenCounts]
    selections: list[FrameSelection | None]
    warnings: list[str]
    prune_threshold: float | None


@dataclasses.dataclass(frozen=True)
class ProcessorOutput:
    """A prompt ready for the model.

    Attributes:
      sample: Token ids, patches and loss weights of the conversation.
      selections: The frames of each video that the model sees, None for an image; in order of appearance.
      warnings: Messages for the user about damaged or reduced media, one line each.
      prune_threshold: The threshold that videos were pruned with, None if they were not.
    """

    sample: Sample
    selections: list[FrameSelection | None]
    warnings: list[str]
    prune_threshold: float | None

    @property
    def videos(self) -> list[FrameSelection]:
        """The frames of each video that the model sees, in order of appearance."""
        return [selection for selection in self.selections if selection is not None]

    @property
    def visual_tokens(self) -> int:
        """Number of vision tokens after pruning."""
        return self.sample.num_vision_tokens

    @property
    def visual_tokens_before_pruning(self) -> int:
        """Number of vision tokens before pruning."""
        return sum(len(visual.keep) for visual in self.sample.visuals)

    def save_frames(self, folder: str | os.PathLike) -> list[str]:
        """Writes the images and frames as the model gets them; names and errors are those of `saved_frames`.

        With pruning, each frame of a video has a second picture, `..._kept.png`, with its pruned blocks dimmed.

        Args:
          folder: A new or an empty folder.

        Returns:
          The paths of the pictures in order, those of the second kind left out.
        """
        return saved_frames.save_frames(
            self.sample.visuals, self.selections, folder, with_kept=self.prune_threshold is not None
        )


class Processor:
    """Converts conversations to samples. It may be called from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ProcessorConfig | None = None,
        on_frame: Callable[[str, int, int], None] = lambda name, done, total: None,
        media: MediaCache | None = None,
    ):
        """Creates a processor.

        Args:
          tokenizer: Tokenizer of the checkpoint.
          config: Settings; the defaults if None.
          on_frame: Callback after each decoded frame: (name of the video, frames done, total frames).
          media: Keeps the decoded media of earlier prompts; None keeps nothing.
        """
        self.tokenizer = tokenizer
        self.config = config or ProcessorConfig()
        self.on_frame = on_frame
        self._media = media

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, **overrides: Any) -> "Processor":
        """Creates a processor with the tokenizer and settings of a checkpoint folder.

        Args:
          folder: Checkpoint folder.
          **overrides: Fields of `ProcessorConfig` that take precedence over the files.
        """
        return cls(Tokenizer.from_folder(folder), ProcessorConfig.from_folder(folder, **overrides))

    def __call__(
        self,
        conversation: Sequence[Mapping[str, Any] | messages.Turn],
        add_generation_prompt: bool = True,
        add_system_prompt: bool = False,
        supervise: bool = False,
    ) -> ProcessorOutput:
        """Processes one conversation.

        Args:
          conversation: Messages in the form that `messages.parse_messages` accepts.
          add_generation_prompt: End with the opening of an assistant turn.
          add_system_prompt: Start with the official system prompt, if the conversation has none.
          supervise: Set the `loss_weight` of the sample for training, with `loss_weights.token_loss_weights`.

        Raises:
          InputError: A message, image, video or setting is invalid; the error names it.
        """
        turns = messages.parse_messages(conversation)
        if add_system_prompt:
            turns = chat_template.with_default_system(turns)
        media = self.read_media(turns)
        style = chat_template.PromptStyle(self.config.native_placeholders)
        regions = region_cells.all_region_tokens(turns, media.visuals)
        sizes = list(map(len, regions))
        rendered = chat_template.render(turns, media.token_counts, self.tokenizer, style, sizes)
        weights = loss_weights.token_loss_weights(rendered, self.tokenizer) if supervise else None
        suffix = chat_template.generation_prompt(self.tokenizer) if add_generation_prompt else []
        sample = assemble_sample(rendered, media.visuals, weights, suffix, regions)
        return ProcessorOutput(sample, media.selections, media.warnings, media.prune_threshold)

    def read_media(self, turns: Sequence[messages.Turn]) -> DecodedMedia:
        """Decodes, resizes and prunes all media of a conversation, or finds them in the cache.

        Raises:
          InputError: An image, video or setting is invalid; the error names it.
        """
        key = None if self._media is None else self._media.key(turns, self.config)
        if self._media is None or key is None:
            return self._decode_media(turns)
        media = self._media.get(key)
        if media is None:
            media = self._decode_media(turns)
            self._media.put(key, media)
        return media

    def _decode_media(self, turns: Sequence[messages.Turn]) -> DecodedMedia:
        readers = [open_media(part, self.config) for turn in turns for part in turn.media]
        is_video = [isinstance(reader, VideoReader) for reader in readers]
        visuals, threshold = pruning.prune(self._visuals(readers), is_video, self.config)
        token_counts = [
            chat_template.VisualTokenCounts(
                visual.keep.reshape(visual.grid[0], -1).sum(axis=1).tolist(), reader.timestamps
            )
            for visual, reader in zip(visuals, readers, strict=True)
        ]
        selections = [reader.selection if isinstance(reader, VideoReader) else None for reader in readers]
        warnings = [warning for reader in readers for warning in reader.warnings]
        return DecodedMedia(visuals, token_counts, selections, warnings, threshold)

    def _visuals(self, readers: Sequence[MediaReader]) -> list[Visual]:
        """Resizes all media to the sizes that the token budget of the prompt allows."""
        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 4)) as pool:
            while True:  # repeated when a damaged video turns out shorter than stated: the sizes depend on its length
                with contextlib.suppress(PlanChangedError):
                    return self._resize_all(readers, pool)

    def _resize_all(self, readers: Sequence[MediaReader], pool: ThreadPoolExecutor) -> list[Visual]:
        """Processes images in parallel in the pool, and videos one after the other with their frames in the pool."""
        items, config = [self._resize_item(reader) for reader in readers], self.config
        sizes = resize.target_sizes(items, config.preprocess, config.min_tokens, config.max_tokens)
        media = list(zip(readers, items, sizes, strict=True))
        image_tasks = [
            pool.submit(_process_image, reader, item, size)
            for reader, item, size in media
            if isinstance(reader, images.ImageReader)
        ]
        image_visuals = (task.result() for task in image_tasks)
        return [
            self._process_video(reader, item, size, pool) if isinstance(reader, VideoReader) else next(image_visuals)
            for reader, item, size in media
        ]

    def _process_video(
        self, reader: VideoReader, item: resize.ResizeItem, size: tuple[int, int], pool: ThreadPoolExecutor
    ) -> Visual:
        return Visual(_patchify_frames(self._decode_frames(reader), item, size, pool), _grid(item, size), item.merge)

    def _resize_item(self, reader: MediaReader) -> resize.ResizeItem:
        merge = self.config.video_merge if isinstance(reader, VideoReader) else self.config.image_merge
        return resize.ResizeItem(reader.height, reader.width, merge, reader.num_frames, reader.name)

    def _decode_frames(self, reader: VideoReader) -> Iterator[Image.Image]:
        for done, frame in enumerate(reader.frames(), start=1):
            self.on_frame(reader.name, done, len(reader.indices))
            yield frame


def open_media(part: messages.MediaPart, config: ProcessorConfig) -> MediaReader:
    """Opens an image or video without decoding it.

    Size, number of frames, times and damage are read from headers and packets, so they are known at once.

    Args:
      part: The image or video; its own options take precedence over the settings.
      config: Settings of frame sampling.

    Raises:
      InputError: The source is missing or unreadable, or an option does not apply to it; the error names it.
    """
    if part.kind == "image":
        return images.open_image(part.source, note_transparency=config.preprocess != "native")
    options = dict(part.options)
    timestamps = options.pop("timestamps", None)
    names = ["fps", "max_frames", "preprocess", "threads"]
    if videos.holds_frames(part.source):
        if "fps" in options:
            raise InputError("video frames: fps does not apply to frames already chosen; leave it out")
        names.remove("fps")
    defaults = {name: getattr(config, name) for name in names}
    return videos.open_video(part.source, FrameSamplingOptions(**{**defaults, **options}), timestamps)


def assemble_sample(
    turns: Sequence[chat_template.RenderedTurn],
    visuals: Sequence[Visual],
    weights: Sequence[np.ndarray] | None = None,
    suffix: Sequence[int] = (),
    regions: Sequence[np.ndarray] = (),
) -> Sample:
    """Joins rendered messages to one sample.

    Args:
      turns: The messages.
      visuals: Their images and videos in order of appearance.
      weights: [n] float32, the loss weights of each message; None is 0 everywhere.
      suffix: Token ids that follow the last message, with loss weight 0.
      regions: The vision tokens of each region of the messages, which come behind all images and videos.
    """
    tokens = np.concatenate([*(turn.tokens for turn in turns), np.array(suffix, np.int32)])
    is_vision = np.concatenate([*(turn.is_vision for turn in turns), np.zeros(len(suffix), bool)])
    weights = [np.zeros(len(turn.tokens), np.float32) for turn in turns] if weights is None else weights
    loss_weight = np.concatenate([*weights, np.zeros(len(suffix), np.float32)])
    repeated = np.concatenate([np.zeros(0, np.int32), *regions])
    return Sample(tokens, is_vision, visuals, loss_weight, repeated=repeated)


def _grid(item: resize.ResizeItem, size: tuple[int, int]) -> tuple[int, int, int]:
    return item.frames, size[0] // PATCH, size[1] // PATCH


def _process_image(reader: images.ImageReader, item: resize.ResizeItem, size: tuple[int, int]) -> Visual:
    pixels = np.asarray(resize.resize_image(reader.load(), size))
    return Visual(patchify.patchify(pixels[None], item.merge), _grid(item, size), item.merge)


def _patchify_frames(
    frames: Iterator[Image.Image], item: resize.ResizeItem, size: tuple[int, int], pool: ThreadPoolExecutor
) -> np.ndarray:
    """Resizes frames and cuts them into patches.

    Frames are resized in the pool while the next ones are decoded; only a few are held at a time.

    Returns:
      [t * gh * gw, 588] uint8.
    """
    count, rows, columns = _grid(item, size)
    patches = np.empty((count, rows * columns, PATCH_DIM), np.uint8)

    def write_patches(frame: Image.Image, out: np.ndarray) -> None:
        out[:] = patchify.patchify(np.asarray(resize.resize_frame(frame, size))[None], item.merge)

    tasks: list[Future] = []
    for frame, out in zip(frames, patches, strict=True):
        tasks.append(pool.submit(write_patches, frame, out))
        if len(tasks) > _MAX_PENDING:
            tasks[-1 - _MAX_PENDING].result()
    for task in tasks:
        task.result()
    return patches.reshape(-1, PATCH_DIM)
