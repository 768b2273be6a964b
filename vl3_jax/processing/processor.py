"""The processor: converts a conversation with images and videos to one sample of the packed batch.

processor = Processor.from_folder("checkpoint")
processed = processor([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, "What happens?"]}])
processed.sample                                      # input of packed_batch.pack
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing import chat_template, images, loss_weights, messages, patchify, resize, videos
from vl3_jax.processing.packed_batch import PATCH_DIM, Sample, Visual
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.resize import PATCH
from vl3_jax.processing.tokenizer import Tokenizer
from vl3_jax.processing.video_reader import FrameSamplingOptions, PlanChangedError, VideoReader


@dataclasses.dataclass(frozen=True)
class SampledFrames:
    """The frames of a video that the model sees.

    Attributes:
      name: Name of the video: its path, or the kind of object.
      indices: Index of each frame in the source.
      timestamps: Time in seconds written before each frame; None if no times are written.
    """

    name: str
    indices: list[int]
    timestamps: list[float] | None


@dataclasses.dataclass(frozen=True)
class ProcessorOutput:
    """A prompt ready for the model.

    Attributes:
      sample: Token ids, patches and loss weights of the conversation.
      videos: Sampled frames of each video, in order of appearance.
      visual_tokens: Number of vision tokens after pruning.
      visual_tokens_before_pruning: Number of vision tokens before pruning.
      warnings: Messages for the user about damaged or reduced media, one line each.
    """

    sample: Sample
    videos: list[SampledFrames]
    visual_tokens: int
    visual_tokens_before_pruning: int
    warnings: list[str]

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids, including the placeholders of the vision tokens left after pruning."""
        return self.sample.tokens.tolist()


class Processor:
    """Converts conversations to samples. It may be called from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ProcessorConfig | None = None,
        on_frame: Callable[[str, int, int], None] = lambda name, done, total: None,
    ):
        """Creates a processor.

        Args:
          tokenizer: Tokenizer of the checkpoint.
          config: Settings; the defaults if None.
          on_frame: Callback after each decoded frame: (name of the video, frames done, total frames).
        """
        self.tokenizer = tokenizer
        self.config = config or ProcessorConfig()
        self.on_frame = on_frame

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
        conversation: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        add_system_prompt: bool = False,
        supervise: bool = False,
        rng: np.random.Generator | None = None,
        trainer_streams: bool = False,
    ) -> ProcessorOutput:
        """Processes one conversation.

        Args:
          conversation: Messages in the form that `messages.parse_messages` accepts.
          add_generation_prompt: End with the opening of an assistant turn.
          add_system_prompt: Start with the official system prompt, if the conversation has none.
          supervise: Set the `loss_weight` of the sample for training, with `loss_weights.token_loss_weights`.
          rng: Generator for the balancing of stream decisions.
          trainer_streams: Write and supervise stream messages as the official trainer does.

        Raises:
          InputError: A message, image, video or setting is invalid; the error names it.
        """
        turns = messages.parse_messages(conversation)
        if add_system_prompt:
            turns = chat_template.with_default_system(turns)
        media = [part for turn in turns for part in turn.media]
        readers = [self._open(part) for part in media]
        visuals = self._visuals(media, readers)

        style = chat_template.PromptStyle(self.config.native_placeholders, trainer_streams)
        token_counts = [
            chat_template.VisualTokenCounts(
                visual.keep.reshape(visual.grid[0], -1).sum(axis=1).tolist(), getattr(reader, "timestamps", None)
            )
            for visual, reader in zip(visuals, readers, strict=True)
        ]
        rendered = chat_template.render(turns, token_counts, self.tokenizer, style)
        tokens = [turn.tokens for turn in rendered]
        is_vision = [turn.is_vision for turn in rendered]
        weights = [np.zeros(turn.tokens.shape, np.float32) for turn in rendered]
        if supervise:
            weights = loss_weights.token_loss_weights(rendered, self.tokenizer, rng, trainer_streams)
        if add_generation_prompt:
            opening = np.array(chat_template.generation_prompt(self.tokenizer), np.int32)
            tokens, is_vision = [*tokens, opening], [*is_vision, np.zeros(opening.shape, bool)]
            weights = [*weights, np.zeros(opening.shape, np.float32)]
        return ProcessorOutput(
            sample=Sample(
                np.concatenate(tokens), np.concatenate(is_vision), visuals, loss_weight=np.concatenate(weights)
            ),
            videos=[
                SampledFrames(reader.name, list(reader.indices), reader.timestamps)
                for reader in readers
                if isinstance(reader, VideoReader)
            ],
            visual_tokens=sum(visual.num_tokens for visual in visuals),
            visual_tokens_before_pruning=sum(len(visual.keep) for visual in visuals),
            warnings=[warning for reader in readers for warning in reader.warnings],
        )

    def _open(self, part: messages.MediaPart) -> images.ImageReader | VideoReader:
        if part.kind == "image":
            return images.open_image(part.source)
        options = dict(part.options)
        timestamps = options.pop("timestamps", None)
        if isinstance(part.source, np.ndarray | list | tuple):
            unsupported = sorted(set(options) - {"max_frames"})
            if unsupported:
                raise InputError(
                    f"video frames: {unsupported[0]} does not apply to frames already chosen; leave it out"
                )
            return videos.open_video(part.source, FrameSamplingOptions(**options) if options else None, timestamps)
        defaults = FrameSamplingOptions(
            fps=self.config.fps,
            max_frames=self.config.max_frames,
            preprocess=self.config.preprocess,
            threads=self.config.threads,
        )
        return videos.open_video(part.source, dataclasses.replace(defaults, **options), timestamps)

    def _visuals(
        self, media: Sequence[messages.MediaPart], readers: Sequence[images.ImageReader | VideoReader]
    ) -> list[Visual]:
        """Resizes all media to the sizes that the token budget of the prompt allows."""
        merges = [self.config.image_merge if part.kind == "image" else self.config.video_merge for part in media]
        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 4)) as pool:
            while True:  # repeated when a damaged video turns out shorter than stated: the sizes depend on its length
                items = [_resize_item(reader, merge) for reader, merge in zip(readers, merges, strict=True)]
                sizes = resize.target_sizes(
                    items, self.config.preprocess, self.config.min_tokens, self.config.max_tokens
                )
                try:
                    return self._resize_all(readers, items, sizes, pool)
                except PlanChangedError:
                    continue

    def _resize_all(
        self,
        readers: Sequence[images.ImageReader | VideoReader],
        items: Sequence[resize.ResizeItem],
        sizes: Sequence[tuple[int, int]],
        pool: ThreadPoolExecutor,
    ) -> list[Visual]:
        """Processes images in parallel in the pool, and videos one after the other with their frames in the pool."""
        image_tasks = {
            index: pool.submit(_process_image, reader, items[index], sizes[index])
            for index, reader in enumerate(readers)
            if isinstance(reader, images.ImageReader)
        }
        return [
            image_tasks[index].result()
            if index in image_tasks
            else self._process_video(reader, items[index], sizes[index], pool)
            for index, reader in enumerate(readers)
        ]

    def _process_video(
        self, reader: VideoReader, item: resize.ResizeItem, size: tuple[int, int], pool: ThreadPoolExecutor
    ) -> Visual:
        patches = _patchify_frames(self._decode_frames(reader), item, size, pool)
        config = self.config
        keep = None
        if config.prune_threshold is not None and item.frames > 1:
            keep = patchify.pruning_mask(
                patches,
                item.frames,
                item.merge,
                config.prune_threshold,
                config.prune_min_tokens,
                config.image_mean,
                config.image_std,
            )
        return Visual(patches, _grid(item, size), item.merge, keep)

    def _decode_frames(self, reader: VideoReader) -> Iterator[Image.Image]:
        for done, frame in enumerate(reader.frames(), start=1):
            self.on_frame(reader.name, done, len(reader.indices))
            yield frame


def _resize_item(reader: images.ImageReader | VideoReader, merge: int) -> resize.ResizeItem:
    frames = len(reader.indices) if isinstance(reader, VideoReader) else 1
    return resize.ResizeItem(reader.height, reader.width, merge, frames, reader.name)


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

    _run_bounded(pool.submit(write_patches, frame, out) for frame, out in zip(frames, patches, strict=True))
    return patches.reshape(-1, PATCH_DIM)


def _run_bounded(tasks: Iterable[Future], max_pending: int = 8) -> None:
    """Consumes a lazy series of tasks, keeping at most `max_pending` unfinished ones, and raises their errors."""
    pending: collections.deque[Future] = collections.deque()
    for task in tasks:
        pending.append(task)
        if len(pending) > max_pending:
            pending.popleft().result()
    while pending:
        pending.popleft().result()
