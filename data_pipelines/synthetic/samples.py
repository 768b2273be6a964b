"""A generated sample: its media, questions and answers, and its annotation record."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.synthetic.scenes import Scene, SyntheticVideo


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A sample whose media are not rendered yet.

    Attributes:
      media: Images, or one video; empty for text alone.
      turns: Pairs of question and answer.
      details: What `reference` holds besides the answer and the media.
      utterances: Of a live stream, instead of `turns`: role, text and time in seconds of each utterance.
    """

    media: tuple[Scene | SyntheticVideo, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    utterances: tuple[tuple[str, str, float], ...] = ()

    @property
    def question(self) -> str:
        """The first question; of a stream, the user's request."""
        return self.turns[0][0] if self.turns else self.utterances[0][1]

    @property
    def answer(self) -> str:
        """The true answer to the first question; of a stream, the assistant's first utterance."""
        return self.turns[0][1] if self.turns else self.utterances[1][1]

    @property
    def reference(self) -> dict[str, Any]:
        """JSON values: "answer", what the task's metric needs (see `scoring`), and "media", facts of each medium."""
        media = {"media": [medium.facts() for medium in self.media]} if self.media else {}
        return {"answer": self.answer} | dict(self.details) | media

    @property
    def video(self) -> SyntheticVideo | None:
        """The video, or None if the sample has none."""
        return next((medium for medium in self.media if isinstance(medium, SyntheticVideo)), None)

    def record(self, media: Sequence[Any], task: str) -> dict[str, Any]:
        """Returns the annotation record.

        Args:
          media: The value to store for each medium: a file name, or the content.
          task: Name of the task.
        """
        fields: dict[str, Any] = {"task": task, "reference": self.reference}
        kind = "image" if self.video is None else "video"
        if self.media:
            fields[kind] = list(media)
        if self.utterances:
            turns = [{"role": role, "content": text, "time": time} for role, text, time in self.utterances]
            return fields | {"stream": True, "conversation": turns}
        messages = [(role, text) for turn in self.turns for role, text in zip(("human", "gpt"), turn, strict=True)]
        turns = [{"from": role, "value": text} for role, text in messages]
        turns[0]["value"] = f"<{kind}>\n" * len(self.media) + self.question
        return fields | {"conversations": turns}
