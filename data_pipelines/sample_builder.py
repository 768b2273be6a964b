"""Builds a training sample from a record, and measures the lengths of a sample without decoding its media."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines import stream_layout
from data_pipelines.annotations import Conversation, to_conversation
from data_pipelines.lengths import MediaInfo, SampleLengths, SampleSize
from data_pipelines.media_resolver import MediaResolver
from data_pipelines.sample_errors import CHANGED, UNREADABLE, BadSampleError, SampleError, from_exception
from data_pipelines.settings import DataSettings
from data_pipelines.sources import Record
from vl3_jax.processing import chat_template, loss_weights, messages
from vl3_jax.processing.packed_batch import PATCH_DIM, Sample, Visual
from vl3_jax.processing.processor import Processor, ProcessorOutput
from vl3_jax.processing.tokenizer import Tokenizer
from vl3_jax.processing.video_reader import VideoReader


class SampleBuilder:
    """Builds samples from records. Thread-safe; pickling stores its arguments, and the tokenizer is read again.

    Args:
      tokenizer: A checkpoint folder or the path of a tokenizer.json.
      settings: The data settings.
    """

    def __init__(self, tokenizer: str | os.PathLike, settings: DataSettings):
        self.settings = settings
        self._tokenizer_path = os.fspath(tokenizer)
        self._style = chat_template.PromptStyle(settings.processor.native_placeholders, settings.trainer_streams)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read at first use."""
        return Tokenizer.from_folder(self._tokenizer_path)

    @property
    def tokenizer_file(self) -> str:
        """The path of tokenizer.json."""
        path = self._tokenizer_path
        return os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self._tokenizer_path, "settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def lengths(
        self, record: Record | SampleError, media: MediaResolver, kept: bool = False
    ) -> SampleLengths | SampleError:
        """Measures the text tokens and the media of a record.

        Args:
          record: A record of a source.
          media: Resolves the media of the record.
          kept: Also count the vision tokens that pruning keeps, which decodes videos; otherwise they are only scanned.

        Returns:
          The lengths, or the error of a bad sample.
        """
        if isinstance(record, SampleError):
            return record
        conversation = to_conversation(record.fields, record.where, media, self.settings.processor.fps)
        if isinstance(conversation, SampleError):
            return conversation
        try:
            if kept:
                return self._decoded_lengths(conversation)
            return self._lengths(conversation)
        except Exception as error:  # a damaged file may raise anything; it is an error of this sample only
            return from_exception(error, record.where)

    def sample(
        self, record: Record | SampleError, media: MediaResolver, size: SampleSize, seed: Sequence[int], task: int = 0
    ) -> Sample | SampleError:
        """Builds the sample of a record, within its planned size.

        Args:
          record: A record of a source.
          media: Resolves the media of the record.
          size: The planned size.
          seed: Seed of the random choices within a sample (the balancing of stream decisions).
          task: Task id, for the loss per task.

        Returns:
          The sample, or the error of a bad sample; also if the sample exceeds the planned size.
        """
        if isinstance(record, SampleError):
            return record
        conversation = to_conversation(record.fields, record.where, media, self.settings.processor.fps)
        if isinstance(conversation, SampleError):
            return conversation
        try:
            sample = self._sample(conversation, size.budget, np.random.default_rng(list(seed)))
            sample = self._fit_to_plan(truncate(sample, self.settings.shape.length), size)
        except Exception as error:  # a damaged file may raise anything; it is an error of this sample only
            return from_exception(error, record.where)
        sample.task = task
        return sample

    def _process(
        self, conversation: Conversation, budget: int, rng: np.random.Generator | None = None
    ) -> ProcessorOutput:
        config = dataclasses.replace(self.settings.processor, max_tokens=budget)
        processed = Processor(self.tokenizer, config)(
            conversation.messages,
            add_generation_prompt=False,
            supervise=True,
            rng=rng,
            trainer_streams=self.settings.trainer_streams,
        )
        _raise_if_damaged([warning for warning in processed.warnings if "damaged" in warning])
        return processed

    def _sample(self, conversation: Conversation, budget: int, rng: np.random.Generator) -> Sample:
        processed = self._process(conversation, budget, rng)
        if not conversation.stream:
            return processed.sample
        (visual,) = processed.sample.visuals
        frame_tokens = visual.keep.reshape(visual.grid[0], -1).sum(axis=1).tolist()
        layout = _interleave(conversation, processed.videos[0].timestamps, frame_tokens)
        turns = chat_template.render(layout.turns, layout.token_counts, self.tokenizer, self._style)
        weights = loss_weights.token_loss_weights(turns, self.tokenizer, rng, self.settings.trainer_streams)
        return Sample(
            np.concatenate([turn.tokens for turn in turns]),
            np.concatenate([turn.is_vision for turn in turns]),
            [stream_layout.truncate_frames(visual, layout.frames)],
            np.concatenate(weights),
        )

    def _lengths(self, conversation: Conversation) -> SampleLengths:
        processor = Processor(self.tokenizer, self.settings.processor)
        turns = messages.parse_messages(conversation.messages)
        # `_open` is private to Processor; using it keeps these lengths equal to those that it produces.
        readers = [processor._open(medium) for turn in turns for medium in turn.media]
        _raise_if_damaged(
            [warning for reader in readers if isinstance(reader, VideoReader) for warning in reader.warnings]
        )
        times = [reader.timestamps if isinstance(reader, VideoReader) else None for reader in readers]
        frames = [len(reader.indices) if isinstance(reader, VideoReader) else 1 for reader in readers]
        text = self._count_text_tokens(conversation, turns, frames, times)
        media = [
            MediaInfo(isinstance(reader, VideoReader), reader.height, reader.width, count)
            for reader, count in zip(readers, frames, strict=True)
        ]
        return SampleLengths(text, tuple(media))

    def _count_text_tokens(
        self, conversation: Conversation, turns: list[messages.Turn], frames: list[int], times: list[Any]
    ) -> int:
        """Counts all tokens that are not vision tokens."""
        token_counts = [
            chat_template.VisualTokenCounts([0] * count, seconds) for count, seconds in zip(frames, times, strict=True)
        ]
        if conversation.stream:
            layout = _interleave(conversation, times[0], [0] * frames[0])
            turns, token_counts = layout.turns, layout.token_counts
        rendered = chat_template.render(turns, token_counts, self.tokenizer, self._style)
        return sum(len(turn.tokens) for turn in rendered)

    def _decoded_lengths(self, conversation: Conversation) -> SampleLengths:
        lengths = self._lengths(conversation)
        if not any(medium.is_video for medium in lengths.media):
            return lengths
        sample = self._sample(conversation, self.settings.processor.max_tokens, np.random.default_rng(0))
        media = [
            dataclasses.replace(medium, kept=visual.num_tokens)
            for medium, visual in zip(lengths.media, sample.visuals, strict=True)
        ]
        return SampleLengths(lengths.text, tuple(media))

    def _fit_to_plan(self, sample: Sample, size: SampleSize) -> Sample:
        """Checks that a sample is within its planned size; a larger one would break its whole row."""
        patches = sum(len(visual.patches) for visual in sample.visuals)
        fits = (
            len(sample.tokens) <= size.tokens
            and sample.num_vision_tokens <= size.vision_tokens
            and patches <= size.patches
        )
        if fits and self.settings.shape.vision_rows > 1:
            sample.visuals = _pad_to_plan(sample.visuals, size)
            fits = sample.visuals is not None
        if not fits:
            raise BadSampleError(
                CHANGED,
                f"{len(sample.tokens)} tokens and {patches} patches, planned were {size.tokens} and {size.patches}; "
                "index the data again",
            )
        return sample


def truncate(sample: Sample, length: int) -> Sample:
    """Cuts a sample at its end to `length` tokens.

    Vision tokens beyond the cut are pruned; frames and media without any token left are removed.
    """
    if len(sample.tokens) <= length:
        return sample
    left = int(sample.is_vision[:length].sum())
    visuals = []
    for visual in sample.visuals:
        keep = visual.keep & (np.cumsum(visual.keep) <= left)
        left -= int(keep.sum())
        frames = int(np.flatnonzero(keep)[-1]) // visual.tokens_per_frame + 1 if keep.any() else 0
        if frames:
            visuals.append(
                stream_layout.truncate_frames(Visual(visual.patches, visual.grid, visual.merge, keep), frames)
            )
    return Sample(sample.tokens[:length], sample.is_vision[:length], visuals, sample.loss_weight[:length], sample.task)


def placeholder_sample(size: SampleSize, vision_rows: int) -> Sample:
    """Returns the placeholder for an unreadable sample in a planned row: one token with loss weight 0.

    With several vision rows it also holds padding frames as planned, none of whose tokens is kept, so that the frames
    of the samples after it are assigned to vision rows as planned.
    """
    visuals = [_padding_frames(patches, count) for patches, count in size.frames] if vision_rows > 1 else []
    return Sample(np.zeros(1, np.int32), visuals=visuals)


def _pad_to_plan(visuals: Sequence[Visual], size: SampleSize) -> list[Visual] | None:
    """Adds padding frames for planned frames that truncation or the end of a stream removed; None if sizes differ."""
    if len(visuals) > len(size.frames):
        return None
    padded: list[Visual] = []
    for number, (patches, count) in enumerate(size.frames):
        if number >= len(visuals):
            padded.append(_padding_frames(patches, count))
            continue
        visual = visuals[number]
        if visual.patches_per_frame != patches or visual.grid[0] > count:
            return None
        padded.append(visual)
        if visual.grid[0] < count:
            padded.append(_padding_frames(patches, count - visual.grid[0]))
    return padded


def _padding_frames(patches: int, frames: int) -> Visual:
    """Returns `frames` black frames of `patches` patches each, all of whose tokens are pruned."""
    total = patches * frames
    return Visual(np.zeros((total, PATCH_DIM), np.uint8), (frames, 1, patches), 1, np.zeros(total, bool))


def _raise_if_damaged(warnings: Sequence[str]) -> None:
    """Rejects damaged videos: the readable part may lack what the answer describes."""
    if warnings:
        raise BadSampleError(UNREADABLE, warnings[0], warnings[0].split(": ")[0])


def _interleave(
    conversation: Conversation, times: Sequence[float] | None, frame_tokens: Sequence[int]
) -> stream_layout.StreamLayout:
    layout = stream_layout.interleave_stream(conversation, times, frame_tokens)
    if not layout.frames:
        raise BadSampleError(UNREADABLE, "the stream has no frame before its last turn; check the times")
    return layout
