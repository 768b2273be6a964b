"""Times in answers about videos: read and written in the forms of models and data sets, compared and drawn.

    found = vl3.times.parse_all("She waves from 3 to 5 seconds and at 1:05.")  # [Span(3.0, 5.0), Span(65.0, 65.0)]
    vl3.times.format(found[0], "clock")  # "00:03-00:05"
    vl3.times.draw(found, duration=90).save("timeline.png")

A `Span` holds seconds from the beginning of the video.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

_COLOUR, _GROUND, _TEXT = "#4363d8", "#e0e0e0", "#303030"

_FACTORS = {"h": 3600, "m": 60, "s": 1}
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_CLOCK = r"(?:\d+:)?\d{1,2}:\d{2}(?:[.,]\d+)?"
_HOURS, _MINUTES = rf"{_NUMBER}\s*(?:hours?|hrs?|h)\b", rf"{_NUMBER}\s*(?:minutes?|mins?)\b"
_SECONDS = rf"{_NUMBER}\s*(?:seconds?|secs?|s)\b"
# "1 h 2 min", "2m3s", "1 minute and 5 seconds", "12.5 s"; an m that stands alone is a metre.
_UNITS = (
    rf"(?:\d+\s*h\s*)?\d+\s*m\s*{_NUMBER}\s*s\b"
    rf"|{_HOURS}(?:[\s,]*(?:and\s+)?{_MINUTES})?(?:[\s,]*(?:and\s+)?{_SECONDS})?"
    rf"|{_MINUTES}(?:[\s,]*(?:and\s+)?{_SECONDS})?"
    rf"|{_SECONDS}"
)
_TIME = rf"(?<![\w.:])(?:{_UNITS}|{_CLOCK}|{_NUMBER})(?![\d:])"
_DASH = r"(?:-->|->|-|–|—|~|→|to\b|until\b|till\b)"
_PATTERN = re.compile(
    "|".join(
        (
            # {"start_time": "00:03.00", "end_time": "00:05.00"}
            rf"""["']?start(?:[_ ](?:time|sec|timestamp))?["']?\s*:\s*["']?(?P<key0>{_TIME})["']?\s*,?\s*"""
            rf"""["']?end(?:[_ ](?:time|sec|timestamp))?["']?\s*:\s*["']?(?P<key1>{_TIME})""",
            # 24.3 30.4##a person turns on a light
            rf"(?<=\s)(?P<line0>{_NUMBER})\s+(?P<line1>{_NUMBER})(?=\s*##)",
            rf"\[\s*[\"']?(?P<list0>{_TIME})[\"']?\s*,\s*[\"']?(?P<list1>{_TIME})[\"']?\s*\]",
            rf"\(\s*(?P<tuple0>{_TIME})\s*,\s*(?P<tuple1>{_TIME})\s*\)",
            rf"\bbetween\s+(?P<between0>{_TIME})\s+and\s+(?P<between1>{_TIME})",
            rf"\bstart(?:s|ed|ing)?\b[^\d.,;]{{0,24}}(?P<start0>{_TIME})[^\d.;]{{0,40}}?"
            rf"\bend(?:s|ed|ing)?\b[^\d.;]{{0,24}}(?P<start1>{_TIME})",
            rf"(?<!\d-)(?P<range0>{_TIME})\s*{_DASH}\s*(?P<range1>{_TIME})(?!-\d)",
            rf"(?<![\w.:])(?P<moment0>{_UNITS}|{_CLOCK})(?![\d:])",
        )
    ),
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Span:
    """A span of time in seconds from the beginning of the video; ends in the other order are put right.

    Attributes:
      start: When it begins.
      end: When it ends; equal to `start` for a moment.

    Raises:
      ValueError: A time is negative or not a finite number.
    """

    start: float
    end: float

    def __post_init__(self):
        ends = sorted((float(self.start), float(self.end)))
        if not all(map(math.isfinite, ends)) or ends[0] < 0:
            raise ValueError(f"times are finite and not below 0, not {self.start} and {self.end}")
        object.__setattr__(self, "start", ends[0])
        object.__setattr__(self, "end", ends[1])

    @property
    def duration(self) -> float:
        """Seconds from start to end."""
        return self.end - self.start

    @property
    def is_moment(self) -> bool:
        """Whether it has no duration."""
        return self.start == self.end

    def iou(self, other: "Span") -> float:
        """Returns the intersection over union with another span; 0 if both are moments."""
        intersection = max(min(self.end, other.end) - max(self.start, other.start), 0.0)
        union = self.duration + other.duration - intersection
        return intersection / union if union else 0.0


def parse_all(text: str, unit: float = 1.0) -> list[Span]:
    """Returns all spans and moments of an answer in their order; what is malformed is none.

    Two numbers with a hyphen or a word between them (`3 to 5`, `1.0-2.0 s`) and a list of two are a span, also without
    units. A time that stands alone counts where it has a unit or a colon: `at 12 s`, `at 1:05`, but not `3 people`.

    Args:
      text: The answer.
      unit: Seconds that a number without a unit stands for: 1 / fps where a model counts frames, and a hundredth of the
        duration where it counts hundredths of the video.
    """
    spans = []
    for match in _PATTERN.finditer(text):
        times = [part for part in match.groups() if part is not None]
        end = _seconds(times[-1], unit)
        single = re.fullmatch(rf"{_NUMBER}\s*([a-z])[a-z]*", times[-1], re.IGNORECASE)
        # In "5-10 minutes" the unit is that of both.
        start = _seconds(times[0], _FACTORS[single[1].lower()] if single else unit)
        if math.isfinite(start) and math.isfinite(end):
            spans.append(Span(start, end))
    return spans


def parse(text: str, unit: float = 1.0) -> Span:
    """Returns the only span or moment of an answer; a number that is the whole answer counts too.

    Args:
      text: The answer.
      unit: As of `parse_all`.

    Raises:
      ValueError: There is none, or several.
    """
    if re.fullmatch(_NUMBER, text.strip()):
        return Span(float(text) * unit, float(text) * unit)
    spans = parse_all(text, unit)
    if len(spans) != 1:
        raise ValueError(f"expected one time and found {len(spans)} in {text[:200]!r}")
    return spans[0]


def format(spans: Span | Iterable[Span], form: str = "seconds") -> str:
    """Writes spans and moments in a form that `parse_all` reads.

    Args:
      spans: A span, or several.
      form: A key of `FORMS`.

    Raises:
      ValueError: There is no such form.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; use one of {', '.join(FORMS)}")
    text = ", ".join(FORMS[form](span) for span in ([spans] if isinstance(spans, Span) else spans))
    return f"[{text}]" if form in ("list", "json") else text


def draw(spans: Span | Iterable[Span], duration: float | None = None, size: tuple[int, int] = (640, 48)) -> Any:
    """Draws spans and moments on a timeline.

    Args:
      spans: A span, or several.
      duration: Seconds of the video; by default up to the last of the spans.
      size: Width and height of the image in pixels.

    Returns:
      A PIL image in RGB.

    Raises:
      ValueError: There is nothing to draw, or the duration is not above 0.
    """
    from PIL import Image, ImageDraw, ImageFont

    spans = [spans] if isinstance(spans, Span) else list(spans)
    duration = max((span.end for span in spans), default=0.0) if duration is None else duration
    if not duration > 0:
        raise ValueError("the duration of a timeline must be above 0; give the seconds of the video")
    (width, height), font = size, ImageFont.load_default(max(size[1] / 4, 8))
    image = Image.new("RGB", size, "white")
    canvas, bar = ImageDraw.Draw(image), (0, height // 2)
    canvas.rectangle((0, 0, width - 1, bar[1]), fill=_GROUND)
    for span in spans:
        start, end = (min(time / duration, 1) * (width - 1) for time in (span.start, span.end))
        canvas.rectangle((start, 0, max(end, start + 1), bar[1]), fill=_COLOUR)
    canvas.text((0, bar[1] + 2), clock(0, duration), fill=_TEXT, font=font)
    last = clock(duration, duration)
    canvas.text((width - canvas.textlength(last, font=font), bar[1] + 2), last, fill=_TEXT, font=font)
    return image


def clock(seconds: float, longest: float | None = None, decimals: int = 0) -> str:
    """Returns a time as mm:ss, from an hour on as hh:mm:ss.

    Args:
      seconds: The time.
      longest: A time that is written in the same way; from an hour on, both have hours.
      decimals: Digits of fractions of a second.
    """
    ticks = round(seconds * 10**decimals)
    whole, fraction = divmod(ticks, 10**decimals)
    minutes, hours = whole // 60, whole // 3600
    fractions = f".{fraction:0{decimals}}" if decimals else ""
    if max(whole, longest or 0) >= 3600:
        return f"{hours:02}:{minutes % 60:02}:{whole % 60:02}{fractions}"
    return f"{minutes:02}:{whole % 60:02}{fractions}"


def _seconds(text: str, unit: float) -> float:
    """Returns the seconds of a time in any of the forms of `_TIME`."""
    if ":" in text:
        digits = [float(part.replace(",", ".")) for part in text.split(":")]
        return sum(part * 60**power for power, part in enumerate(reversed(digits)))
    if re.fullmatch(_NUMBER, text):
        return float(text) * unit
    parts = re.findall(rf"({_NUMBER})\s*([hms])", text.lower())
    return sum(float(number) * _FACTORS[letter] for number, letter in parts)


def _joined(span: Span, write: Callable[[float], str], join: str = "-") -> str:
    return write(span.start) if span.is_moment else join.join((write(span.start), write(span.end)))


def _plain(decimals: int) -> Callable[[float], str]:
    return lambda seconds: f"{seconds:.{decimals}f}"


def _vtt(seconds: float) -> str:
    return clock(seconds, 3600, 3)


def _json_object(span: Span) -> str:
    return json.dumps({"start_time": clock(span.start, decimals=2), "end_time": clock(span.end, decimals=2)})


# How a span is written. docs/inference.md names the models and data sets of each form.
FORMS: dict[str, Callable[[Span], str]] = {
    "seconds": lambda span: f"{_joined(span, _plain(1))} s",
    "words": lambda span: (
        f"at {span.start:.1f} seconds" if span.is_moment else f"from {span.start:.1f} to {span.end:.1f} seconds"
    ),
    "clock": lambda span: _joined(span, lambda seconds: clock(seconds, span.end)),
    "vtt": lambda span: _joined(span, _vtt, " --> "),
    "list": lambda span: f"[{span.start:.2f}, {span.end:.2f}]",
    "json": _json_object,
}
