"""One question with its media, and how it is written as an annotation record."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.synthetic.scenes import Scene, SyntheticVideo


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A sample whose media are not drawn yet.

    Attributes:
      media: pictures, or one clip; none for text alone.
      turns: questions and answers.
      truth: what an answer is judged by, for JSON: "answer", and what the task's metric needs (see `scoring`).
      said: of a live stream instead of `turns`: role, text and second of each utterance.
    """

    media: tuple[Scene | SyntheticVideo, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    truth: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    said: tuple[tuple[str, str, float], ...] = ()

    @property
    def question(self) -> str:
        """The first question; of a stream, what the user asks for."""
        return self.turns[0][0] if self.turns else self.said[0][1]

    @property
    def answer(self) -> str:
        """The true answer to the first question; of a stream the first thing said."""
        return self.turns[0][1] if self.turns else self.said[1][1]

    @property
    def clip(self) -> SyntheticVideo | None:
        """The clip, if it has one."""
        return next((one for one in self.media if isinstance(one, SyntheticVideo)), None)

    def record(self, media: Sequence[Any], task: str) -> dict[str, Any]:
        """The annotation record.

        Args:
          media: of each medium, what stands for it in the record: a file name, or its content.
          task: its name.
        """
        fields: dict[str, Any] = {"task": task, "truth": dict(self.truth)}
        kind = "image" if self.clip is None else "video"
        if self.media:
            fields[kind] = list(media)
        if self.said:
            turns = [{"role": role, "content": text, "time": time} for role, text, time in self.said]
            return fields | {"stream": True, "conversation": turns}
        tags = f"<{kind}>\n" * len(self.media)
        turns = []
        for number, (question, answer) in enumerate(self.turns):
            turns.append({"from": "human", "value": question if number else tags + question})
            turns.append({"from": "gpt", "value": answer})
        return fields | {"conversations": turns}
