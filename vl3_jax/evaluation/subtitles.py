"""Subtitles: which of them a prompt shows, given the times of the frames that the model sees."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SRT_TIMES = re.compile(r"(\d+):(\d+):(\d+)[,.](\d+)\s*-->\s*(\d+):(\d+):(\d+)[,.](\d+)[^\n]*\n")
_MIN_SECONDS = 1.0  # a shorter subtitle counts as this long

Cue = tuple[float, float, str]


def read_srt(text: str) -> list[Cue]:
    """Returns start and end in seconds and the text of each cue of an SRT file, lines joined with blanks."""
    text = text.replace("\r\n", "\n").replace("\r", "\n") + "\n"
    times, cues = list(_SRT_TIMES.finditer(text)), []
    for time, following in zip(times, [*times[1:], None], strict=True):
        lines = text[time.end() : following.start() if following else len(text)].split("\n")
        lines = [line.strip() for line in lines]
        while lines and not lines[-1]:
            lines.pop()
        if following and lines and lines[-1].isdecimal():  # the number of the next cue
            lines.pop()
        values = [int(value) for value in time.groups()]
        start, end = (3600 * h + 60 * m + s + ms / 1000 for h, m, s, ms in (values[:4], values[4:]))
        cues.append((start, end, " ".join(line for line in lines if line)))
    return cues


def lines_at(cues: Sequence[Cue], times: Sequence[float]) -> list[str]:
    """Returns for each frame time the text of the first cue around it; a cue is repeated for each of its frames."""
    found = (next((text for start, end, text in cues if start < time < end), "") for time in times)
    return [text for text in found if text.strip()]


def interleave(
    cues: Sequence[Mapping[str, Any]], times: Sequence[float], offset: float, duration: float
) -> list[tuple[int, str]]:
    """Returns the texts that stand between frames, each with the number of frames before it.

    Args:
      cues: `{start, end, line}` with times as `HH:MM:SS.mmm`, or `{timestamp: [start, end], text}` in seconds.
      times: Times of the frames in seconds.
      offset: Time of the subtitles at which the video starts.
      duration: Duration of the video in seconds, the end of a cue without one.
    """
    texts, emitted = [], 0
    for cue in cues:
        if "timestamp" in cue:
            (start, end), text = cue["timestamp"], cue["text"]
        else:
            start, end, text = _seconds(cue["start"]), cue["end"] and _seconds(cue["end"]), cue["line"]
        start, end = float(start) - offset, float(duration if end is None else end) - offset
        middle = (start + end) / 2
        while emitted < len(times) and times[emitted] <= middle:
            emitted += 1
        if end - start < _MIN_SECONDS:
            start, end = middle - _MIN_SECONDS / 2, middle + _MIN_SECONDS / 2
        if any(start < time < end for time in times):
            texts.append((emitted, text))
    return texts


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
