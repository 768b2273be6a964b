"""Lays out live streams: the frames of a video between the turns, each frame a message of its own."""

import dataclasses
from collections.abc import Sequence

from data_pipelines.annotations import Conversation
from vl3_jax.processing.chat_template import VisualTokenCounts
from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.processing.packed_batch import Visual


@dataclasses.dataclass(frozen=True)
class StreamLayout:
    """The messages of a stream.

    Attributes:
      turns: Frames and turns in order of time.
      token_counts: Vision tokens of each frame in `turns`.
      frames: Number of frames in `turns`, from the beginning of the video.
    """

    turns: list[Turn]
    token_counts: list[VisualTokenCounts]
    frames: int


def interleave_stream(
    conversation: Conversation, times: Sequence[float] | None, frame_tokens: Sequence[int]
) -> StreamLayout:
    """Interleaves frames and turns by time; frames after the last turn are left out.

    Args:
      conversation: The conversation of a stream.
      times: Times of the video's frames, in seconds of the file; None assumes one frame per second.
      frame_tokens: Vision tokens of each frame.
    """
    seconds = list(times) if times is not None else [conversation.stream_start + n for n in range(len(frame_tokens))]
    turns, token_counts = [], []
    for turn in conversation.stream:
        while len(token_counts) < len(seconds) and seconds[len(token_counts)] <= turn.time:
            time = seconds[len(token_counts)] - conversation.stream_start
            turns.append(Turn("stream", [MediaPart("image", None, time=time)]))
            token_counts.append(VisualTokenCounts([frame_tokens[len(token_counts)]]))
        turns.append(Turn(turn.role, [turn.text]))
    return StreamLayout(turns, token_counts, len(token_counts))


def truncate_frames(visual: Visual, frames: int) -> Visual:
    """Returns the first `frames` frames of a video with their pruning mask."""
    return Visual(
        visual.patches[: frames * visual.patches_per_frame],
        (frames, *visual.grid[1:]),
        visual.merge,
        visual.keep[: frames * visual.tokens_per_frame],
    )
