"""Builds a training sample from a record, and measures the lengths of a sample without decoding its media."""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from data_pipelines.annotations import Conversation, parse_conversation
from data_pipelines.packing.lengths import UNKNOWN, MediaInfo, SampleLengths, SampleSize
from data_pipelines.record_counts import RecordCounts
from data_pipelines.sample_errors import CHANGED, UNREADABLE, BadSampleError, SampleError
from data_pipelines.settings import DataSettings
from data_pipelines.sources import Record, map_record
from data_pipelines.sources.media_resolver import MediaResolver
from vl3_jax.processing import chat_template, loss_weights
from vl3_jax.processing.chat_template import VisualTokenCounts
from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.processing.packed_batch import PATCH_DIM, Sample, Visual
from vl3_jax.processing.processor import MediaReader, Processor, assemble_sample, open_media
from vl3_jax.processing.processor_config import ProcessorConfig
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

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read at first use."""
        return Tokenizer.from_folder(self._tokenizer_path)

    @functools.cached_property
    def tokenizer_hash(self) -> str:
        """A hash of the content of tokenizer.json."""
        path = pathlib.Path(self._tokenizer_path)
        content = (path / "tokenizer.json" if path.is_dir() else path).read_bytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def __reduce__(self):
        return SampleBuilder, (self._tokenizer_path, self.settings)

    def measure(
        self, record: Record | SampleError, media: MediaResolver, kept: bool = False
    ) -> tuple[SampleLengths, RecordCounts] | SampleError:
        """Measures the text tokens and the media of a record.

        Args:
          record: A record of a source.
          media: Resolves the media of the record.
          kept: Also count the vision tokens that pruning keeps, which decodes videos; otherwise they are only scanned.

        Returns:
          The lengths and what was read, or the error of a bad sample.
        """

        def measure(record: Record) -> tuple[SampleLengths, RecordCounts]:
            conversation = self._parse(record, media)
            return self._lengths(conversation, kept), conversation.counts

        return map_record(record, measure)

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

        def build(record: Record) -> Sample:
            sample = self._sample(self._parse(record, media), size.budget, np.random.default_rng(list(seed)))
            sample = self._fit_to_plan(truncate(sample, self.settings.shape.length), size)
            return dataclasses.replace(sample, task=task)

        return map_record(record, build)

    def _parse(self, record: Record, media: MediaResolver) -> Conversation:
        return parse_conversation(record.fields, media, self.settings.processor.fps)

    def _lengths(self, conversation: Conversation, kept: bool) -> SampleLengths:
        readers = open_conversation(conversation, self.settings.processor)
        counts = [VisualTokenCounts([0] * reader.num_frames, reader.timestamps) for reader in readers]
        rendered, _ = self._render(conversation, counts)
        after_pruning = [UNKNOWN] * len(readers)
        if kept and any(isinstance(reader, VideoReader) for reader in readers):
            sample = self._sample(conversation, self.settings.processor.max_tokens, np.random.default_rng(0))
            after_pruning = [visual.num_tokens for visual in sample.visuals]
        media = [
            MediaInfo(isinstance(reader, VideoReader), reader.height, reader.width, reader.num_frames, tokens)
            for reader, tokens in zip(readers, after_pruning, strict=True)
        ]
        return SampleLengths(sum(len(turn.tokens) for turn in rendered), tuple(media))

    def _sample(self, conversation: Conversation, budget: int, rng: np.random.Generator) -> Sample:
        config = dataclasses.replace(self.settings.processor, max_tokens=budget)
        media = Processor(self.tokenizer, config).read_media(conversation.turns)
        raise_if_damaged(media.warnings)
        rendered, num_frames = self._render(conversation, media.token_counts)
        weights = loss_weights.token_loss_weights(rendered, self.tokenizer, rng, self.settings.trainer_streams)
        visuals = [media.visuals[0].first_frames(num_frames)] if conversation.stream else media.visuals
        return assemble_sample(rendered, visuals, weights)

    def _render(
        self, conversation: Conversation, counts: Sequence[VisualTokenCounts]
    ) -> tuple[list[chat_template.RenderedTurn], int]:
        """Returns the token ids of each message, and the number of media (of a stream: frames) among them."""
        turns = conversation.turns
        if conversation.stream:
            turns, counts = _interleave_stream(conversation, counts[0])
        style = chat_template.PromptStyle(self.settings.processor.native_placeholders, self.settings.trainer_streams)
        return chat_template.render(turns, counts, self.tokenizer, style), len(counts)

    def _fit_to_plan(self, sample: Sample, size: SampleSize) -> Sample:
        """Checks that a sample is within its planned size; a larger one would break its whole row."""
        patches = sum(len(visual.patches) for visual in sample.visuals)
        fits = len(sample.tokens) <= size.tokens and sample.num_vision_tokens <= size.vision_tokens
        visuals = sample.visuals if self.settings.shape.vision_rows == 1 else _pad_to_plan(sample.visuals, size)
        if not fits or patches > size.patches or visuals is None:
            raise BadSampleError(
                CHANGED,
                f"{len(sample.tokens)} tokens and {patches} patches, planned were {size.tokens} and {size.patches}; "
                "index the data again",
            )
        return dataclasses.replace(sample, visuals=visuals)


def open_conversation(conversation: Conversation, config: ProcessorConfig) -> list[MediaReader]:
    """Opens all media of a conversation from their headers.

    Raises:
      BadSampleError: A medium is damaged, or a stream has no frame before its last turn.
      InputError: A medium is missing or unreadable.
    """
    readers = [open_media(part, config) for turn in conversation.turns for part in turn.media]
    raise_if_damaged([warning for reader in readers for warning in reader.warnings])
    if conversation.stream:
        _interleave_stream(conversation, VisualTokenCounts([0] * readers[0].num_frames, readers[0].timestamps))
    return readers


def raise_if_damaged(warnings: Sequence[str]) -> None:
    """Rejects damaged media: the readable part may lack what the answer describes."""
    for warning in warnings:
        file, _, remark = warning.rpartition(": ")
        if "damaged" in remark:
            raise BadSampleError(UNREADABLE, warning, file)


def truncate(sample: Sample, length: int) -> Sample:
    """Cuts a sample at its end to `length` tokens.

    Vision tokens beyond the cut are pruned; frames and media without any token left are removed.
    """
    if len(sample.tokens) <= length:
        return sample
    left = int(sample.is_vision[:length].sum())
    repeated = sample.repeated[: max(left - sample.num_vision_tokens, 0)]
    visuals = []
    for visual in sample.visuals:
        keep = visual.keep & (np.cumsum(visual.keep) <= left)
        left -= int(keep.sum())
        frames = int(np.flatnonzero(keep)[-1]) // visual.tokens_per_frame + 1 if keep.any() else 0
        if frames:
            visuals.append(dataclasses.replace(visual, keep=keep).first_frames(frames))
    kept = sample.tokens[:length], sample.is_vision[:length], visuals, sample.loss_weight[:length]
    return Sample(*kept, sample.task, repeated)


def placeholder_sample(size: SampleSize, vision_rows: int) -> Sample:
    """Returns the placeholder for an unreadable sample in a planned row: one token with loss weight 0.

    With several vision rows it also holds padding frames as planned, none of whose tokens is kept, so that the frames
    of the samples after it are assigned to vision rows as planned.
    """
    visuals = [_padding_frames(patches, count) for patches, count in size.frames] if vision_rows > 1 else []
    return Sample(np.zeros(1, np.int32), visuals=visuals)


def _interleave_stream(
    conversation: Conversation, counts: VisualTokenCounts
) -> tuple[list[Turn], list[VisualTokenCounts]]:
    """Interleaves the frames and turns of a live stream by time, each frame as a message of its own.

    Frames after the last turn are left out.

    Args:
      conversation: The conversation of a stream.
      counts: Vision tokens of all frames of its video, and their times in seconds of the file; without times there is
        one frame per second.

    Returns:
      Frames and turns in order of time, and the vision tokens of each frame among them.

    Raises:
      BadSampleError: There is no frame before the last turn.
    """
    seconds = counts.times
    if seconds is None:
        seconds = [conversation.stream_start + frame for frame in range(len(counts.frame_tokens))]
    turns, used = [], []
    for turn in conversation.stream:
        while len(used) < len(seconds) and seconds[len(used)] <= turn.time:
            time = seconds[len(used)] - conversation.stream_start
            turns.append(Turn("stream", [MediaPart("image", None, time=time)]))
            used.append(VisualTokenCounts([counts.frame_tokens[len(used)]]))
        turns.append(Turn(turn.role, [turn.text], turn.learned))
    if not used:
        raise BadSampleError(UNREADABLE, "the stream has no frame before its last turn; check the times")
    return turns, used


def _pad_to_plan(visuals: Sequence[Visual], size: SampleSize) -> list[Visual] | None:
    """Adds padding frames for planned frames that truncation or the end of a stream removed; None if sizes differ."""
    if len(visuals) > len(size.frames):
        return None
    padded: list[Visual] = []
    for (patches, missing), visual in itertools.zip_longest(size.frames, visuals):
        if visual is not None:
            missing -= visual.grid[0]
            if visual.patches_per_frame != patches or missing < 0:
                return None
            padded.append(visual)
        if missing:
            padded.append(_padding_frames(patches, missing))
    return padded


def _padding_frames(patches: int, frames: int) -> Visual:
    """Returns `frames` black frames of `patches` patches each, all of whose tokens are pruned."""
    total = patches * frames
    return Visual(np.zeros((total, PATCH_DIM), np.uint8), (frames, 1, patches), 1, np.zeros(total, bool))
