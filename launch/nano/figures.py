"""Figures of docs/nano.md: the questions, the loss of each task over all stages, scores after each stage."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from data_pipelines.synthetic.registry import IMAGE, IMAGES, STREAM, TASKS, TEXT, VIDEO
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scenes import Scene, SyntheticVideo

PANELS = {"text": (TEXT,), "one picture": (IMAGE,), "two pictures": (IMAGES,), "clips and streams": (VIDEO, STREAM)}
_DOTS = 90  # per inch
_SMOOTH = 5  # reports of a run that are averaged
_COLUMNS = 3  # of the examples
_GAP = 3  # white pixels between frames
_COLOURS = 255  # of a picture file


def examples(drawn: Mapping[str, Example], path: os.PathLike) -> None:
    """One question of each task with what is shown."""
    rows = -(-len(drawn) // _COLUMNS)
    figure, places = plt.subplots(rows, _COLUMNS, figsize=(12, 1.6 * rows), gridspec_kw={"hspace": 0.8})
    for place in places.flat:
        place.axis("off")
        place.set_anchor("NW")
    for (task, one), place in zip(drawn.items(), places.flat, strict=False):
        place.set_title(task, fontsize=9, fontweight="bold", loc="left")
        if one.media:
            place.imshow(_side_by_side(one.media), interpolation="nearest")
        words = f"{one.question}\n{_answer(one)}"
        place.text(0, -0.06 if one.media else 1, words, transform=place.transAxes, fontsize=8, va="top")
    _save(figure, path)


def losses(runs: Sequence[Sequence[Mapping[str, Any]]], path: os.PathLike) -> None:
    """The loss of each task.

    Args:
      runs: the reports (lines of metrics.jsonl) of each stage.
      path: of the picture.
    """
    figure, places = plt.subplots(2, 2, figsize=(11, 8), sharex=True)
    ends = np.cumsum([0, *(reports[-1]["step"] for reports in runs)])
    for (title, media), place in zip(PANELS.items(), places.flat, strict=True):
        names = [name for name, task in TASKS.items() if task.media in media]
        colours = plt.get_cmap("tab20")(np.linspace(0, 1, max(len(names), 2)))
        for name, colour in zip(names, colours, strict=False):
            label = name
            for begin, reports in zip(ends, runs, strict=False):
                found = [(one["step"], one[f"loss/{name}"]) for one in reports if f"loss/{name}" in one]
                if found:
                    steps, values = np.array(found, float).T
                    place.plot(begin + steps, _smoothed(values), color=colour, lw=1.2, label=label)
                    label = None
        for stage, begin in enumerate(ends[:-1]):
            place.axvline(begin, color="0.8", lw=0.8)
            place.text(begin, 1, f" {stage}", transform=place.get_xaxis_transform(), fontsize=7, va="top")
        place.set_title(title, fontsize=10, loc="left")
        place.set_yscale("log")
        if place.get_legend_handles_labels()[0]:
            place.legend(fontsize=7, ncols=2, loc="lower left")
        place.grid(alpha=0.3)
    for place in places[:, 0]:
        place.set_ylabel("loss of a supervised token, nats")
    for place in places[1]:
        place.set_xlabel("steps; the lines begin stages 0 to 4")
    _save(figure, path)


def scores(tasks: Mapping[str, Mapping[str, Any]], path: os.PathLike) -> None:
    """Scores after each stage, beside those of a constant answer.

    Args:
      tasks: of `report.collect`: by name "stages" and "majority".
      path: of the picture.
    """
    table = np.array([[one["majority"], *one["stages"]] for one in tasks.values()]) * 100
    table = np.vstack([table, table.mean(axis=0)])
    figure, place = plt.subplots(figsize=(6.5, 0.27 * len(table) + 0.8))
    place.imshow(table, cmap="YlGn", vmin=0, vmax=115, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        place.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8)
    stages = [f"stage {number}" for number in range(table.shape[1] - 1)]
    place.set_xticks(range(table.shape[1]), ["constant\nanswer", *stages], fontsize=8)
    place.set_yticks(range(len(table)), [*(name.partition("/")[2] for name in tasks), "mean"], fontsize=8)
    place.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    place.axhline(len(table) - 1.5, color="black", lw=0.8)
    place.axvline(0.5, color="black", lw=0.8)
    _save(figure, path)


def reports(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _answer(one: Example) -> str:
    if one.turns:
        return f"→ {one.answer}"
    return "→ " + ", ".join(f"{text} at {time:.0f} s" for role, text, time in one.said if role == "assistant")


def _side_by_side(media: Sequence[Scene | SyntheticVideo]) -> np.ndarray:
    """[h, w, 3] uint8: pictures, or the frames of a clip, in a row on white."""
    pictures = [
        frame for one in media for frame in (one.pixels() if isinstance(one, SyntheticVideo) else [one.pixels()])
    ]
    height = max(len(picture) for picture in pictures)
    padded = [
        np.pad(picture, ((0, height - len(picture)), (0, _GAP), (0, 0)), constant_values=255) for picture in pictures
    ]
    return np.concatenate(padded, axis=1)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those around it; fewer at the ends."""
    width = np.ones(min(_SMOOTH, len(values)))
    return np.convolve(values, width, "same") / np.convolve(np.ones(len(values)), width, "same")


def _save(figure: plt.Figure, path: os.PathLike) -> None:
    figure.savefig(path, dpi=_DOTS, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(_COLOURS).save(path, optimize=True)
