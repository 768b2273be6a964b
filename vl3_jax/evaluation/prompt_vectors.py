"""Checks prompts: vectors with the fields of an item and the instruction that the official loader makes of them.

A vector is `{"benchmark", "raw", "data_id", "ground_truth", "task_type", "instruction"}`, where useful with `rendered`
(the whole prompt), `interleave` (the parts of the user's turn), `image_order`, `frame_timestamps` and a `note` that
describes subtitles. The items of each benchmark are written to a folder in its real layout and loaded from there.
"""

import json
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation import benchmarks, layouts
from vl3_jax.evaluation.benchmark import FrameTimes, Item
from vl3_jax.evaluation.benchmarks.mlvu import TASKS as MLVU_TASKS
from vl3_jax.processing.chat_template import time_label

KEYS = ("benchmark", "raw", "data_id", "instruction")
_CUE = re.compile(r"([\d.]+)-([\d.]+) s '([^']*)'")


def check(vectors: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yields the name of each vector that does not reproduce, with the difference.

    Raises:
      InputError: A benchmark has no layout, or an item lacks a field.
    """
    for name in dict.fromkeys(vector["benchmark"] for vector in vectors):
        chosen = [vector for vector in vectors if vector["benchmark"] == name]
        (benchmark,) = benchmarks.find([name])
        rows: dict[str, dict[str, Any]] = {}
        for vector in chosen:
            try:
                row = _placed(vector)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{name} {vector['data_id']}: raw is no item ({error!r}); correct the vector"
                ) from None
            key = json.dumps({key: value for key, value in row.items() if key != "srt"}, sort_keys=True)
            rows[key] = rows.get(key, {}) | row
        with tempfile.TemporaryDirectory() as folder:
            layouts.write(name, list(rows.values()), pathlib.Path(folder, name))
            items = benchmark.load(folder)
            for vector in chosen:
                difference = _difference(vector, _item_of(vector, items), _times_of(vector, chosen))
                if difference:
                    yield f"{name} {vector['data_id']}", difference


def rendered(content: Sequence[Mapping[str, Any]], frame_times: FrameTimes) -> str:
    """Returns the text of a prompt, with `<image>` for every image and frame.

    Args:
      content: Parts of the user's turn.
      frame_times: Gives the times of the frames of a video.
    """
    texts = []
    for part in content:
        if part["type"] == "text":
            texts.append(part["text"])
        elif part["type"] == "image":
            texts.append("<image>" if part.get("inline") else "<image>\n")
        else:
            texts += [
                segment if isinstance(segment, str) else ",".join(f"{time_label(t)}<image>" for t in segment) + "\n"
                for segment in _segments(part, frame_times(part))
            ]
    return f"<|im_start|>user\n{''.join(texts)}<|im_end|>\n<|im_start|>assistant\n"


def _segments(part: Mapping[str, Any], times: Sequence[float]) -> list[str | list[float]]:
    """Returns the texts of a video and the times of the frames between them."""
    segments: list[str | list[float]] = []
    start = 0
    for end, text in [*part.get("inserts", ()), (len(times), "")]:
        if end > start:
            segments.append(list(times[start:end]))
            start = end
        if text:
            segments.append(text)
    return segments


def _placed(vector: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of an item with those that say where its layout puts it."""
    name, row, task = vector["benchmark"], dict(vector["raw"]), vector.get("task_type")
    identifier, answer = str(vector["data_id"]), vector.get("ground_truth")
    if name == "MathVista":
        row.setdefault("pid", identifier)
    elif name == "GQA":
        row.setdefault("answer", answer)
    elif name == "MME":
        row.setdefault("image", f"{task}/{identifier.removeprefix(str(task)).removesuffix(str(answer))}")
    elif name == "mlvu":
        row.setdefault("task", MLVU_TASKS.get(str(task)))
    elif name in ("mvbench", "ChartQA"):
        row.setdefault("task", task)
    elif name == "perception_test":
        row.setdefault("video", identifier.removesuffix(f"_{row['id']}"))
    elif name == "videomme" and (cues := _CUE.findall(vector.get("note", ""))):
        blocks = [f"{n}\n{_clock(a)} --> {_clock(b)}\n{text}\n" for n, (a, b, text) in enumerate(cues, start=1)]
        row.setdefault("srt", "\n".join(blocks).replace("/", "\n"))
    return row


def _clock(seconds: str) -> str:
    minutes, rest = divmod(float(seconds), 60)
    return f"{int(minutes // 60):02}:{int(minutes % 60):02}:{rest:06.3f}".replace(".", ",")


def _item_of(vector: Mapping[str, Any], items: Sequence[Item]) -> Item:
    """Returns the item of a vector: that with its id, unless the id is a place among items that are not all here."""
    named = [item for item in items if item.id == str(vector["data_id"])]
    like = [item for item in items if item.text == vector["instruction"]]
    return next(iter([item for item in named if item in like] or like or named or items))


def _times_of(vector: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> FrameTimes:
    """Returns the times of the frames, which another vector of the same item may state."""
    stated = [times for other in (vector, *others) if other["raw"] == vector["raw"] and (times := _stated_times(other))]
    return lambda part: stated[0] if stated else ()


def _stated_times(vector: Mapping[str, Any]) -> Sequence[float]:
    times = vector.get("frame_timestamps") or vector["raw"].get("frame_timestamps")
    noted = re.search(r"timestamps ([\d.,]+) s", vector.get("note", ""))
    return times or ([float(time) for time in noted.group(1).split(",")] if noted else ())


def _difference(vector: Mapping[str, Any], item: Item, frame_times: FrameTimes) -> str | None:
    content = item.content(frame_times)
    texts = [part["text"] if part["type"] == "text" else "<image>" for part in content if part["type"] != "video"]
    images = 0 if any(part.get("inline") for part in content) else len([p for p in content if p["type"] == "image"])
    interleave = [segment for part in content for segment in _parts(part, frame_times)]
    got = {
        "instruction": "".join(texts[images:]),
        "ground_truth": item.reference["target"],
        "task_type": item.reference["task_type"],
        "rendered": rendered(content, frame_times),
        "rendered_fixed": rendered(content, frame_times),
        "interleave": interleave,
    }
    if "image_order" in vector:
        # A picture depends on the name of its column.
        names = {layouts.picture(f"image_{number}{item.id}"): f"image_{number}" for number in range(1, 8)}
        got["image_order"] = [names[part["image"]] for part in content if part["type"] == "image"]
    for key, value in got.items():
        if key in vector and vector[key] != value:
            return f"{key}: expected {json.dumps(vector[key])}, got {json.dumps(value)}"
    return None


def _parts(part: Mapping[str, Any], frame_times: FrameTimes) -> list[dict[str, Any]]:
    if part["type"] != "video":
        return [dict(part) if part["type"] == "text" else {"type": "image"}]
    return [
        {"type": "text", "text": segment}
        if isinstance(segment, str)
        else {"type": "video", "num_frames": len(segment), "timestamps": segment}
        for segment in _segments(part, frame_times(part))
    ]
