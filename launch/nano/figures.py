"""Figures of docs/nano.md: an example of each task, the loss of each task over all stages, scores after each stage."""

import os
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

PANELS = {"text": (TEXT,), "one image": (IMAGE,), "two images": (IMAGES,), "videos and streams": (VIDEO, STREAM)}
_DPI = 90
_SMOOTH = 5  # number of log steps in the moving average
_COLUMNS = 3  # of the examples
_GAP = 3  # white pixels between frames
_COLOURS = 255  # in the palette of an image file


def examples(samples: Mapping[str, Example], path: os.PathLike) -> None:
    """Plots the media, the first question and its answer of each sample.

    Args:
      samples: Samples by task.
      path: Path of the image file.
    """
    rows = -(-len(samples) // _COLUMNS)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(12, 1.6 * rows), gridspec_kw={"hspace": 0.8})
    for ax in axes.flat:
        ax.axis("off")
        ax.set_anchor("NW")
    for (task, sample), ax in zip(samples.items(), axes.flat, strict=False):
        ax.set_title(task, fontsize=9, fontweight="bold", loc="left")
        if sample.media:
            ax.imshow(_side_by_side(sample.media), interpolation="nearest")
        text = f"{sample.question}\n{_answer(sample)}"
        ax.text(0, -0.06 if sample.media else 1, text, transform=ax.transAxes, fontsize=8, va="top")
    _save(figure, path)


def losses(runs: Sequence[Sequence[Mapping[str, Any]]], path: os.PathLike) -> None:
    """Plots the loss of each task over all stages.

    Args:
      runs: For each stage, the lines of its metrics.jsonl.
      path: Path of the image file.
    """
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True)
    stage_starts = np.cumsum([0, *(reports[-1]["step"] for reports in runs)])
    for (title, media), ax in zip(PANELS.items(), axes.flat, strict=True):
        names = [name for name, task in TASKS.items() if task.media in media]
        colours = plt.get_cmap("tab20")(np.linspace(0, 1, max(len(names), 2)))
        for name, colour in zip(names, colours, strict=False):
            label = name
            for start, reports in zip(stage_starts, runs, strict=False):
                points = [(report["step"], report[f"loss/{name}"]) for report in reports if f"loss/{name}" in report]
                if points:
                    steps, values = np.array(points, float).T
                    ax.plot(start + steps, _smoothed(values), color=colour, lw=1.2, label=label)
                    label = None
        for stage, start in enumerate(stage_starts[:-1]):
            ax.axvline(start, color="0.8", lw=0.8)
            ax.text(start, 1, f" {stage}", transform=ax.get_xaxis_transform(), fontsize=7, va="top")
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_yscale("log")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7, ncols=2, loc="lower left")
        ax.grid(alpha=0.3)
    for ax in axes[:, 0]:
        ax.set_ylabel("loss per supervised token, nats")
    for ax in axes[1]:
        ax.set_xlabel("steps; vertical lines mark the start of stages 0 to 4")
    _save(figure, path)


def scores(tasks: Mapping[str, Mapping[str, Any]], path: os.PathLike) -> None:
    """Plots a table of the scores after each stage, beside those of the best constant answer.

    Args:
      tasks: The "tasks" of `report.collect`, of which "stages" and "majority" are used.
      path: Path of the image file.
    """
    table = np.array([[values["majority"], *values["stages"]] for values in tasks.values()]) * 100
    table = np.vstack([table, table.mean(axis=0)])
    figure, ax = plt.subplots(figsize=(6.5, 0.27 * len(table) + 0.8))
    ax.imshow(table, cmap="YlGn", vmin=0, vmax=115, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8)
    stages = [f"stage {number}" for number in range(table.shape[1] - 1)]
    ax.set_xticks(range(table.shape[1]), ["constant\nanswer", *stages], fontsize=8)
    ax.set_yticks(range(len(table)), [*(name.partition("/")[2] for name in tasks), "mean"], fontsize=8)
    ax.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    ax.axhline(len(table) - 1.5, color="black", lw=0.8)
    ax.axvline(0.5, color="black", lw=0.8)
    _save(figure, path)


def _answer(sample: Example) -> str:
    if sample.turns:
        return f"→ {sample.answer}"
    return "→ " + ", ".join(f"{text} at {time:.0f} s" for role, text, time in sample.utterances if role == "assistant")


def _side_by_side(media: Sequence[Scene | SyntheticVideo]) -> np.ndarray:
    """Returns images, or the frames of a video, in a row on white: [h, w, 3] uint8."""
    images = []
    for medium in media:
        images.extend(medium.pixels() if isinstance(medium, SyntheticVideo) else [medium.pixels()])
    height = max(len(image) for image in images)
    padded = [np.pad(image, ((0, height - len(image)), (0, _GAP), (0, 0)), constant_values=255) for image in images]
    return np.concatenate(padded, axis=1)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Returns the centred moving average; fewer values are averaged at the ends."""
    window = np.ones(min(_SMOOTH, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _save(figure: plt.Figure, path: os.PathLike) -> None:
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(_COLOURS).save(path, optimize=True)
