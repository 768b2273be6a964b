"""Writes the report of `vl3 demo`, a self-contained HTML file."""

import base64
import dataclasses
import html
import io
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing.packed_batch import Visual
from vl3_jax.processing.saved_frames import frames_of

_ZOOM = 3  # screen pixels per pixel
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
section { border-top: 1px solid #ccc; padding: 1rem 0 }
h2 { font-size: 1.1rem; margin: 0 0 .5rem }
figure { display: inline-block; margin: 0 .4rem .4rem 0; vertical-align: top; text-align: center; font-size: .85rem }
.frame { position: relative }
.frame img { display: block; image-rendering: pixelated }
.box { position: absolute; box-sizing: border-box; border: 2px solid #1a7f37 }
.box.answer { border: 2px dashed #d4a72c }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; margin: .5rem 0 }
dd { margin: 0 }
.right { color: #1a7f37 } .wrong { color: #c0392b } .statistics { color: #666; font-size: .85rem }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } section { border-color: #444 } }
"""


@dataclasses.dataclass(frozen=True)
class DemoAnswer:
    """An answered question.

    Attributes:
      task: Name of the task.
      question: The question.
      answer: The model's answer; for a stream, what it said after each frame (None for nothing).
      reference: The right answer, in the same form.
      correct: Whether the answer counts as right.
      detail: Overlap with the reference, for tasks that have one.
      boxes: The "reference" box and the "answer" box in thousandths, for tasks that ask for a box.
      visuals: Images and videos as the model received them.
      times: Times of the frames of a video in seconds, or None.
      statistics: Token counts and seconds, as text.
    """

    task: str
    question: str
    answer: str | list[str | None]
    reference: str | list[str | None]
    correct: bool
    detail: str
    boxes: dict[str, list[float]]
    visuals: Sequence[Visual]
    times: list[float] | None
    statistics: str

    @property
    def verdict(self) -> str:
        """The word "right" or "wrong"."""
        return "right" if self.correct else "wrong"


def write(path: str | os.PathLike, answers: Sequence[DemoAnswer], model: str) -> None:
    """Writes the report.

    Raises:
      InputError: The file cannot be written.
    """
    correct = sum(answer.correct for answer in answers)
    sections = "\n".join(_section(number, answer) for number, answer in enumerate(answers, start=1))
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>vl3 demo</title><style>{_STYLE}</style>
<h1>vl3 demo</h1>
<p>{html.escape(model)}: {correct} of {len(answers)} right. The model has never seen these images and videos. They are
shown as the model received them; dimmed patches did not change since the previous frame and were pruned.</p>
{sections}
</html>
"""
    try:
        pathlib.Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; choose another --out") from None


def one_line(answer: str | list[str | None]) -> str:
    """Formats an answer in one line; for a stream, each utterance with its time."""
    if isinstance(answer, str):
        return " ".join(answer.split()) or "(nothing)"
    utterances = [f"{second} s: {word}" for second, word in enumerate(answer) if word is not None]
    return ", ".join(utterances) or "(nothing said)"


def _section(number: int, answer: DemoAnswer) -> str:
    figures = "\n".join(_figures(answer))
    detail = f" ({html.escape(answer.detail)})" if answer.detail else ""
    mark = "✓" if answer.correct else "✗"
    return f"""<section>
<h2>{number}. {html.escape(answer.question)}</h2>
{figures}
<dl><dt>answer</dt><dd class="{answer.verdict}">{html.escape(one_line(answer.answer))} {mark}{detail}</dd>
<dt>reference</dt><dd>{html.escape(one_line(answer.reference))}</dd></dl>
<p class="statistics">{html.escape(answer.task)}: {html.escape(answer.statistics)}</p>
</section>"""


def _figures(answer: DemoAnswer) -> list[str]:
    frames = [frame for visual in answer.visuals for frame in frames_of(visual, dim_pruned=True)]
    words = answer.answer if isinstance(answer.answer, list) else [None] * len(frames)
    figures = []
    for number, (frame, word) in enumerate(zip(frames, words, strict=True)):
        captions = [f"{answer.times[number]:.1f} s"] if answer.times else []
        captions += [f"“{html.escape(word)}”"] if word is not None else []
        figures.append(_figure(frame, ": ".join(captions), answer.boxes))
    return figures


def _figure(frame: np.ndarray, caption: str, boxes: Mapping[str, Sequence[float]]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = frame.shape[0] * _ZOOM, frame.shape[1] * _ZOOM
    overlays = "".join(
        f'<div class="box {kind}" title="{kind}" style="left:{x0 / 10:.1f}%;top:{y0 / 10:.1f}%;'
        f'width:{(x1 - x0) / 10:.1f}%;height:{(y1 - y0) / 10:.1f}%"></div>'
        for kind, (x0, y0, x1, y1) in boxes.items()
    )
    image = f'<img alt="" width="{width}" height="{height}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="frame">{image}{overlays}</div><figcaption>{caption}</figcaption></figure>'
