"""Live streams: the frames of one video between the turns, each frame a message of its own."""

import dataclasses
from collections.abc import Sequence

from data_pipelines.annotations import Conversation
from vl3_jax.processing.chat_template import VisualTokenCounts
from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.processing.packed_batch import Visual


@dataclasses.dataclass(frozen=True)
class StreamLayout:
    """A stream laid out: its messages, what each frame shows, and how many frames of the video that is."""

    turns: list[Turn]
    shown: list[VisualTokenCounts]
    frames: int


def interleave_stream(
    conversation: Conversation, times: Sequence[float] | None, frame_tokens: Sequence[int]
) -> StreamLayout:
    """Puts before each turn the frames seen until then; frames after the last turn are not shown.

    Args:
      conversation: of a stream.
      times: of the video's frames, seconds of the file; None when the frames come without.
      frame_tokens: vision tokens of each frame.
    """
    seconds = list(times) if times is not None else [conversation.stream_start + n for n in range(len(frame_tokens))]
    turns, shown = [], []
    for said in conversation.stream:
        while len(shown) < len(seconds) and seconds[len(shown)] <= said.time:
            time = seconds[len(shown)] - conversation.stream_start
            turns.append(Turn("stream", [MediaPart("image", None, time=time)]))
            shown.append(VisualTokenCounts([frame_tokens[len(shown)]]))
        turns.append(Turn(said.role, [said.text]))
    return StreamLayout(turns, shown, len(shown))


def truncate_frames(visual: Visual, frames: int) -> Visual:
    """The beginning of a video; what was pruned stays pruned."""
    return Visual(
        visual.patches[: frames * visual.patches_per_frame],
        (frames, *visual.grid[1:]),
        visual.merge,
        visual.keep[: frames * visual.tokens_per_frame],
    )
