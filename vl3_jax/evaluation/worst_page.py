"""A page of the answers with the lowest scores, with their pictures and some frames of their videos."""

import base64
import html
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.evaluation import results
from vl3_jax.evaluation.benchmarks.synthetic import GeneratedMedium
from vl3_jax.evaluation.data_folder import StoredImage
from vl3_jax.evaluation.result_tables import page
from vl3_jax.processing import images, videos
from vl3_jax.processing.video_reader import FrameSamplingOptions

WORST = "worst.html"
_WIDTH = 240  # pixels of a picture
_FRAMES = 6  # of a video
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#222;background:#fff}
section{border-top:1px solid #ccc;padding:1rem 0}img{margin:0 .4rem .4rem 0;border:1px solid #ddd}
pre{white-space:pre-wrap;background:#f6f6f6;padding:.6rem;margin:.3rem 0}"""


def worst(samples: Iterable[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Returns the scored samples with the lowest scores, unread ones first, of each task in turn."""
    scored = [sample for sample in samples if "score" in sample and sample["score"] < 1]
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for sample in sorted(scored, key=lambda sample: (sample["score"], "unparsed" not in sample)):
        by_task.setdefault(sample["task"], []).append(sample)
    turns = [sample for rank in range(count) for group in by_task.values() for sample in group[rank : rank + 1]]
    return turns[:count]


def write(samples: Iterable[Mapping[str, Any]], folder: str | os.PathLike, count: int = 50) -> pathlib.Path:
    """Writes `worst.html`, which holds its pictures.

    Args:
      samples: Lines of `samples.jsonl`. The pictures are those of `frames`, paths of saved pictures from `folder` on,
        else are read from `media`; where neither can be read, the page says so.
      folder: Folder to write to.
      count: Number of samples, spread evenly over the tasks.

    Raises:
      InputError: The folder cannot be written.
    """
    sections = [_section(sample, pathlib.Path(folder)) for sample in worst(samples, count)]
    body = "\n".join(
        ["<h1>Lowest scores</h1>", *sections] if sections else ["<h1>Every answer has its full score</h1>"]
    )
    path = pathlib.Path(folder, WORST)
    results.write(path, page("Lowest scores", body, _STYLE))
    return path


def _section(sample: Mapping[str, Any], folder: pathlib.Path) -> str:
    reference, answer = sample.get("reference", {}), sample.get("answer") or ""
    read = f"unread: {sample['unparsed']}" if "unparsed" in sample else f"read as {json.dumps(sample.get('parsed'))}"
    texts = [("Question", sample.get("question", ""))]
    if isinstance(answer, Mapping):  # of masks, which nobody could read
        texts.append(("Answer", answer.get("text", "")))
    else:
        texts += [("Answer", answer), ("Reference", json.dumps(reference.get("target"), ensure_ascii=False))]
    blocks = "".join(f"<b>{name}</b><pre>{html.escape(str(text))}</pre>\n" for name, text in texts)
    title = f"<h2>{html.escape(str(sample['id']))}: {sample['score']:.2f}</h2>\n<p>{html.escape(read)}</p>"
    return f"<section>\n{title}\n<p>{_pictures(sample, folder)}</p>\n{blocks}</section>"


def _pictures(sample: Mapping[str, Any], folder: pathlib.Path) -> str:
    tags = []
    if sample.get("frames"):
        sources: Sequence[Mapping[str, Any]] = [
            {"type": "image", "image": str(folder / frame)} for frame in _spread(sample["frames"])
        ]
    else:
        sources = sample.get("media") or ()
    for part in sources:
        try:
            tags += [_tag(picture, part) for picture in _frames(part)]
        except (InputError, OSError) as error:
            tags.append(f"<i>{html.escape(str(error))}</i>")
    return "".join(tags)


def _frames(part: Mapping[str, Any]) -> Iterator[Image.Image]:
    if part["type"] == "video":
        options = {name: part[name] for name in ("start", "end", "precise_time") if part.get(name) is not None}
        yield from videos.open_video(
            _source(part["video"]), FrameSamplingOptions(max_frames=_FRAMES, **options)
        ).frames()
    else:
        yield images.open_image(_source(part["image"])).load()


def _source(medium: Any) -> Any:
    """Returns a medium of an answer file, or the content of one that is described."""
    if not isinstance(medium, Mapping):
        return medium
    return (StoredImage if "file" in medium else GeneratedMedium)(**medium).read()


def _tag(picture: Image.Image | np.ndarray, part: Mapping[str, Any]) -> str:
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture, out = picture.convert("RGB"), io.BytesIO()
    picture.thumbnail((_WIDTH, _WIDTH))
    picture.save(out, "jpeg", quality=80)
    name = html.escape(str(part[part["type"]]), quote=True)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img title="{name}" alt="" src="data:image/jpeg;base64,{data}">'


def _spread(paths: Sequence[str]) -> list[str]:
    places = np.linspace(0, len(paths) - 1, min(len(paths), _FRAMES)).round().astype(int)
    return [paths[place] for place in places]
