"""The report of `vl3 demo`: one HTML file that needs nothing else."""

import base64
import dataclasses
import html
import io
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from data_pipelines.row_image import assembled
from vl3_jax.errors import InputError
from vl3_jax.processing.packed_batch import Visual, block_coordinates

_ZOOM = 3  # screen pixels of a pixel
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
section { border-top: 1px solid #ccc; padding: 1rem 0 }
h2 { font-size: 1.1rem; margin: 0 0 .5rem }
figure { display: inline-block; margin: 0 .4rem .4rem 0; vertical-align: top; text-align: center; font-size: .85rem }
.seen { position: relative }
.seen img { display: block; image-rendering: pixelated }
.box { position: absolute; box-sizing: border-box; border: 2px solid #1a7f37 }
.box.answer { border: 2px dashed #d4a72c }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; margin: .5rem 0 }
dd { margin: 0 }
.right { color: #1a7f37 } .wrong { color: #c0392b } .facts { color: #666; font-size: .85rem }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } section { border-color: #444 } }
"""


@dataclasses.dataclass(frozen=True)
class DemoAnswer:
    """One question, answered.

    Attributes:
      task: its name.
      question: what was asked.
      answer: a text; of a stream what was said after each frame, None for nothing.
      truth: likewise.
      right: whether the answer is as good as the truth.
      note: how good, where there is more to say.
      boxes: the true box and the answered one, in thousandths, where they are asked for.
      visuals: pictures and clips as the model saw them.
      times: seconds of the frames of a clip.
      facts: tokens and seconds.
    """

    task: str
    question: str
    answer: str | list[str | None]
    truth: str | list[str | None]
    right: bool
    note: str
    boxes: dict[str, list[float]]
    visuals: Sequence[Visual]
    times: list[float] | None
    facts: str


def write(path: str | os.PathLike, outcomes: Sequence[DemoAnswer], model: str) -> None:
    """Writes the report. InputError if it cannot be written."""
    right = sum(one.right for one in outcomes)
    sections = "\n".join(_section(number, one) for number, one in enumerate(outcomes, start=1))
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>vl3 demo</title><style>{_STYLE}</style>
<h1>vl3 demo</h1>
<p>{html.escape(model)}: {right} of {len(outcomes)} right. The model has never seen these pictures and clips. They are
shown as it sees them; patches that did not change since the frame before are dim: the pruner leaves them out.</p>
{sections}
</html>
"""
    try:
        pathlib.Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; choose another --out") from None


def spoken(answer: str | list[str | None]) -> str:
    """An answer in one line; of a stream, what was said when."""
    if isinstance(answer, str):
        return " ".join(answer.split()) or "(nothing)"
    said = [f"{second} s: {word}" for second, word in enumerate(answer) if word is not None]
    return ", ".join(said) or "(nothing said)"


def shown_frames(visual: Visual) -> list[np.ndarray]:
    """Each frame as [h, w, 3] uint8, pruned patches dim."""
    frames, rows, columns = visual.grid
    places = block_coordinates(rows, columns, visual.merge)
    patches = visual.patches.reshape(frames, rows * columns, -1)
    kept = visual.keep.repeat(visual.merge**2).reshape(frames, -1)
    return [assembled(one, places, here) for one, here in zip(patches, kept, strict=True)]


def _section(number: int, one: DemoAnswer) -> str:
    figures = "\n".join(_figures(one))
    verdict = "right" if one.right else "wrong"
    note = f" ({html.escape(one.note)})" if one.note else ""
    mark = "✓" if one.right else "✗"
    return f"""<section>
<h2>{number}. {html.escape(one.question)}</h2>
{figures}
<dl><dt>answer</dt><dd class="{verdict}">{html.escape(spoken(one.answer))} {mark}{note}</dd>
<dt>truth</dt><dd>{html.escape(spoken(one.truth))}</dd></dl>
<p class="facts">{html.escape(one.task)}: {html.escape(one.facts)}</p>
</section>"""


def _figures(one: DemoAnswer) -> list[str]:
    frames = [frame for visual in one.visuals for frame in shown_frames(visual)]
    words = one.answer if isinstance(one.answer, list) else [None] * len(frames)
    figures = []
    for number, (frame, word) in enumerate(zip(frames, words, strict=True)):
        captions = [f"{one.times[number]:.1f} s"] if one.times else []
        captions += [f"“{html.escape(word)}”"] if word is not None else []
        figures.append(_figure(frame, ": ".join(captions), one.boxes))
    return figures


def _figure(frame: np.ndarray, caption: str, boxes: Mapping[str, Sequence[float]]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = frame.shape[0] * _ZOOM, frame.shape[1] * _ZOOM
    marks = "".join(
        f'<div class="box {kind}" title="{kind}" style="left:{x0 / 10:.1f}%;top:{y0 / 10:.1f}%;'
        f'width:{(x1 - x0) / 10:.1f}%;height:{(y1 - y0) / 10:.1f}%"></div>'
        for kind, (x0, y0, x1, y1) in boxes.items()
    )
    picture = f'<img alt="" width="{width}" height="{height}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="seen">{picture}{marks}</div><figcaption>{caption}</figcaption></figure>'
