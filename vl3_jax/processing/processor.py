"""The processor: a conversation with pictures and videos in, one sample of the packed batch out.

processor = Processor.from_folder("checkpoint")
processed = processor([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, "What happens?"]}])
processed.sample                                      # goes to packed_batch.pack
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
    """Which frames of a video the model saw: source indices, and the times written before them (None: none)."""

    name: str
    indices: list[int]
    timestamps: list[float] | None


@dataclasses.dataclass(frozen=True)
class ProcessorOutput:
    """A prompt ready for the model.

    Attributes:
      sample: its arrays.
      videos: one entry for each video, in order of appearance.
      visual_tokens: vision tokens left after pruning.
      visual_tokens_before_pruning: and before.
      notes: what the user should be told of damaged or reduced media, one line each.
    """

    sample: Sample
    videos: list[SampledFrames]
    visual_tokens: int
    visual_tokens_before_pruning: int
    notes: list[str]

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids, placeholders of surviving vision tokens included."""
        return self.sample.tokens.tolist()


class Processor:
    """Turns conversations into samples. Safe to call from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ProcessorConfig | None = None,
        on_frame: Callable[[str, int, int], None] = lambda name, done, total: None,
    ):
        """`on_frame` is told of each decoded frame: the video's name, how many are done, of how many."""
        self.tokenizer = tokenizer
        self.config = config or ProcessorConfig()
        self.on_frame = on_frame

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, **overrides: Any) -> "Processor":
        """Reads tokenizer and settings of a checkpoint folder; `overrides` are fields of `ProcessorConfig`."""
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
          conversation: messages, see `messages.parse_messages`.
          add_generation_prompt: end with the opening of an assistant turn.
          add_system_prompt: begin with the official system prompt, if there is no other.
          supervise: set `loss_weight` for training, see `labels.token_loss_weights`.
          rng: for the balancing of stream decisions.
          trainer_streams: see `chat.Style`.

        Raises:
          InputError: bad message, medium or setting; names it.
        """
        turns = messages.parse_messages(conversation)
        if add_system_prompt:
            turns = chat_template.with_default_system(turns)
        media = [medium for turn in turns for medium in turn.media]
        opened = [self._open(medium) for medium in media]
        visuals = self._visuals(media, opened)

        style = chat_template.PromptStyle(self.config.native_placeholders, trainer_streams)
        shown = [
            chat_template.VisualTokenCounts(
                visual.keep.reshape(visual.grid[0], -1).sum(axis=1).tolist(), getattr(source, "timestamps", None)
            )
            for visual, source in zip(visuals, opened, strict=True)
        ]
        rendered = chat_template.render(turns, shown, self.tokenizer, style)
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
            videos=[SampledFrames(c.name, list(c.indices), c.timestamps) for c in opened if isinstance(c, VideoReader)],
            visual_tokens=sum(visual.num_tokens for visual in visuals),
            visual_tokens_before_pruning=sum(len(visual.keep) for visual in visuals),
            notes=[note for source in opened for note in source.notes],
        )

    def _open(self, medium: messages.MediaPart) -> images.ImageReader | VideoReader:
        if medium.kind == "image":
            return images.open_image(medium.source)
        options = dict(medium.options)
        timestamps = options.pop("timestamps", None)
        if isinstance(medium.source, np.ndarray | list | tuple):
            unfit = sorted(set(options) - {"max_frames"})
            if unfit:
                raise InputError(f"video frames: {unfit[0]} does not apply to frames already chosen; leave it out")
            return videos.open_video(medium.source, FrameSamplingOptions(**options) if options else None, timestamps)
        defaults = FrameSamplingOptions(
            fps=self.config.fps,
            max_frames=self.config.max_frames,
            preprocess=self.config.preprocess,
            threads=self.config.threads,
        )
        return videos.open_video(medium.source, dataclasses.replace(defaults, **options), timestamps)

    def _visuals(
        self, media: Sequence[messages.MediaPart], opened: Sequence[images.ImageReader | VideoReader]
    ) -> list[Visual]:
        """Resizes everything to the sizes that the whole prompt allows."""
        merges = [self.config.image_merge if m.kind == "image" else self.config.video_merge for m in media]
        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 4)) as pool:
            while True:  # again, when a damaged video turns out shorter than planned: the sizes depend on it
                items = [_item(source, merge) for source, merge in zip(opened, merges, strict=True)]
                sizes = resize.target_sizes(
                    items, self.config.preprocess, self.config.min_tokens, self.config.max_tokens
                )
                try:
                    return self._resized(opened, items, sizes, pool)
                except PlanChangedError:
                    continue

    def _resized(
        self,
        opened: Sequence[images.ImageReader | VideoReader],
        items: Sequence[resize.ResizeItem],
        sizes: Sequence[tuple[int, int]],
        pool: ThreadPoolExecutor,
    ) -> list[Visual]:
        """Pictures side by side in the pool, videos one after the other, their frames in the pool."""
        pictures = {
            index: pool.submit(_picture, source, items[index], sizes[index])
            for index, source in enumerate(opened)
            if isinstance(source, images.ImageReader)
        }
        return [
            pictures[index].result() if index in pictures else self._video(source, items[index], sizes[index], pool)
            for index, source in enumerate(opened)
        ]

    def _video(
        self, clip: VideoReader, item: resize.ResizeItem, size: tuple[int, int], pool: ThreadPoolExecutor
    ) -> Visual:
        patches = _resized_frames(self._watched(clip), item, size, pool)
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

    def _watched(self, clip: VideoReader) -> Iterator[Image.Image]:
        for done, frame in enumerate(clip.frames(), start=1):
            self.on_frame(clip.name, done, len(clip.indices))
            yield frame


def _item(source: images.ImageReader | VideoReader, merge: int) -> resize.ResizeItem:
    frames = len(source.indices) if isinstance(source, VideoReader) else 1
    return resize.ResizeItem(source.height, source.width, merge, frames, source.name)


def _grid(item: resize.ResizeItem, size: tuple[int, int]) -> tuple[int, int, int]:
    return item.frames, size[0] // PATCH, size[1] // PATCH


def _picture(image: images.ImageReader, item: resize.ResizeItem, size: tuple[int, int]) -> Visual:
    pixels = np.asarray(resize.resize_image(image.load(), size))
    return Visual(patchify.patchify(pixels[None], item.merge), _grid(item, size), item.merge)


def _resized_frames(
    frames: Iterator[Image.Image], item: resize.ResizeItem, size: tuple[int, int], pool: ThreadPoolExecutor
) -> np.ndarray:
    """[t * gh * gw, 588] uint8. Frames are resized while the next ones are decoded; few are held at a time."""
    count, rows, columns = _grid(item, size)
    patches = np.empty((count, rows * columns, PATCH_DIM), np.uint8)

    def put(image: Image.Image, place: np.ndarray) -> None:
        place[:] = patchify.patchify(np.asarray(resize.resize_frame(image, size))[None], item.merge)

    _drain(pool.submit(put, image, place) for image, place in zip(frames, patches, strict=True))
    return patches.reshape(-1, PATCH_DIM)


def _drain(tasks: Iterable[Future], ahead: int = 8) -> None:
    """Starts tasks no more than `ahead` of the oldest unfinished one."""
    waiting: collections.deque[Future] = collections.deque()
    for task in tasks:
        waiting.append(task)
        if len(waiting) > ahead:
            waiting.popleft().result()
    while waiting:
        waiting.popleft().result()
