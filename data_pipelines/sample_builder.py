"""One record to one training sample; and its lengths, without decoding."""

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
    """Turns records into samples. Safe in threads; pickled, it is its settings and reads the tokenizer anew.

    Args:
      tokenizer: a checkpoint folder or tokenizer.json.
      settings: see there.
    """

    def __init__(self, tokenizer: str | os.PathLike, settings: DataSettings):
        self.settings = settings
        self._tokenizer_path = os.fspath(tokenizer)
        self._style = chat_template.PromptStyle(settings.processor.native_placeholders, settings.trainer_streams)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when first needed."""
        return Tokenizer.from_folder(self._tokenizer_path)

    @property
    def tokenizer_file(self) -> str:
        """Path of tokenizer.json."""
        path = self._tokenizer_path
        return os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self._tokenizer_path, "settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def lengths(
        self, record: Record | SampleError, media: MediaResolver, kept: bool = False
    ) -> SampleLengths | SampleError:
        """Text tokens and sizes of the media; videos are scanned, not decoded, unless `kept` counts are asked for."""
        if isinstance(record, SampleError):
            return record
        conversation = to_conversation(record.fields, record.where, media, self.settings.processor.fps)
        if isinstance(conversation, SampleError):
            return conversation
        try:
            if kept:
                return self._decoded_lengths(conversation)
            return self._lengths(conversation)
        except Exception as error:  # whatever a damaged file provokes is that sample's problem
            return from_exception(error, record.where)

    def sample(
        self, record: Record | SampleError, media: MediaResolver, place: SampleSize, seed: Sequence[int], task: int = 0
    ) -> Sample | SampleError:
        """The sample, within the room that was planned for it.

        Args:
          record: from a source.
          media: finds its media.
          place: as planned.
          seed: of what is random in a sample (the balancing of stream decisions).
          task: for the loss by task.
        """
        if isinstance(record, SampleError):
            return record
        conversation = to_conversation(record.fields, record.where, media, self.settings.processor.fps)
        if isinstance(conversation, SampleError):
            return conversation
        try:
            sample = self._sample(conversation, place.budget, np.random.default_rng(list(seed)))
            sample = self._within(truncate(sample, self.settings.shape.length), place)
        except Exception as error:  # whatever a damaged file provokes is that sample's problem
            return from_exception(error, record.where)
        sample.task = task
        return sample

    def _processed(
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
        _refuse_damaged([note for note in processed.notes if "damaged" in note])
        return processed

    def _sample(self, conversation: Conversation, budget: int, rng: np.random.Generator) -> Sample:
        processed = self._processed(conversation, budget, rng)
        if not conversation.stream:
            return processed.sample
        (visual,) = processed.sample.visuals
        tokens = visual.keep.reshape(visual.grid[0], -1).sum(axis=1).tolist()
        laid = _laid_out(conversation, processed.videos[0].timestamps, tokens)
        turns = chat_template.render(laid.turns, laid.shown, self.tokenizer, self._style)
        weights = loss_weights.token_loss_weights(turns, self.tokenizer, rng, self.settings.trainer_streams)
        return Sample(
            np.concatenate([turn.tokens for turn in turns]),
            np.concatenate([turn.is_vision for turn in turns]),
            [stream_layout.truncate_frames(visual, laid.frames)],
            np.concatenate(weights),
        )

    def _lengths(self, conversation: Conversation) -> SampleLengths:
        processor = Processor(self.tokenizer, self.settings.processor)
        turns = messages.parse_messages(conversation.messages)
        # The processor opens media for its own use only; asking it keeps these lengths true to what it will show.
        opened = [processor._open(medium) for turn in turns for medium in turn.media]
        _refuse_damaged([note for source in opened if isinstance(source, VideoReader) for note in source.notes])
        times = [source.timestamps if isinstance(source, VideoReader) else None for source in opened]
        frames = [len(source.indices) if isinstance(source, VideoReader) else 1 for source in opened]
        text = self._text(conversation, turns, frames, times)
        media = [
            MediaInfo(isinstance(source, VideoReader), source.height, source.width, count)
            for source, count in zip(opened, frames, strict=True)
        ]
        return SampleLengths(text, tuple(media))

    def _text(self, conversation: Conversation, turns: list[messages.Turn], frames: list[int], times: list[Any]) -> int:
        """Tokens of everything but the vision tokens."""
        shown = [
            chat_template.VisualTokenCounts([0] * count, seconds) for count, seconds in zip(frames, times, strict=True)
        ]
        if conversation.stream:
            laid = _laid_out(conversation, times[0], [0] * frames[0])
            turns, shown = laid.turns, laid.shown
        rendered = chat_template.render(turns, shown, self.tokenizer, self._style)
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

    def _within(self, sample: Sample, place: SampleSize) -> Sample:
        """A sample that has outgrown its place would break its whole row."""
        patches = sum(len(visual.patches) for visual in sample.visuals)
        fits = (
            len(sample.tokens) <= place.tokens
            and sample.num_vision_tokens <= place.vision_tokens
            and patches <= place.patches
        )
        if fits and self.settings.shape.vision_rows > 1:
            sample.visuals = _as_planned(sample.visuals, place)
            fits = sample.visuals is not None
        if not fits:
            raise BadSampleError(
                CHANGED,
                f"{len(sample.tokens)} tokens and {patches} patches, planned were {place.tokens} and {place.patches}; "
                "index the data again",
            )
        return sample


def truncate(sample: Sample, length: int) -> Sample:
    """Cuts a sample at its end; the vision tokens whose places go are pruned, media of which none is left too."""
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


def placeholder_sample(place: SampleSize, vision_rows: int) -> Sample:
    """What stands in a planned row for a sample that could not be read: one token without weight.

    With several vision rows also blank frames as planned, of which no token is kept, so that those of the samples
    behind it lie as planned.
    """
    visuals = [_blank(size, count) for size, count in place.frames] if vision_rows > 1 else []
    return Sample(np.zeros(1, np.int32), visuals=visuals)


def _as_planned(visuals: Sequence[Visual], place: SampleSize) -> list[Visual] | None:
    """Fills up with blank frames where truncation or the end of a stream took some; None if sizes differ."""
    if len(visuals) > len(place.frames):
        return None
    filled: list[Visual] = []
    for number, (size, count) in enumerate(place.frames):
        if number >= len(visuals):
            filled.append(_blank(size, count))
            continue
        visual = visuals[number]
        if visual.patches_per_frame != size or visual.grid[0] > count:
            return None
        filled.append(visual)
        if visual.grid[0] < count:
            filled.append(_blank(size, count - visual.grid[0]))
    return filled


def _blank(size: int, frames: int) -> Visual:
    return Visual(np.zeros((size * frames, PATCH_DIM), np.uint8), (frames, 1, size), 1, np.zeros(size * frames, bool))


def _refuse_damaged(notes: Sequence[str]) -> None:
    """Half a video may lack what its answer tells of."""
    if notes:
        raise BadSampleError(UNREADABLE, notes[0], notes[0].split(": ")[0])


def _laid_out(
    conversation: Conversation, times: Sequence[float] | None, frame_tokens: Sequence[int]
) -> stream_layout.StreamLayout:
    laid = stream_layout.interleave_stream(conversation, times, frame_tokens)
    if not laid.frames:
        raise BadSampleError(UNREADABLE, "no frame of the stream is shown before its last turn; check the times")
    return laid
