"""Converts decoded frames to upright RGB with FFmpeg's filters, as the `ffmpeg` program does."""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import av
import av.filter
import numpy as np

Filter = tuple[str, str | None]
_ONE = 1 << 16
_UPRIGHT = (_ONE, 0, 0, 0, _ONE, 0, 0, 0, 1 << 30)


class UprightRgb:
    """Converts frames one after the other; the filters of the last kind of frame are kept."""

    def __init__(self):
        self._graph_for = functools.lru_cache(maxsize=1)(_graph)

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Returns the pixels of a frame, [h, w, 3] uint8."""
        filters = tuple(upright_filters(display_matrix(frame)))
        graph = self._graph_for(frame.width, frame.height, frame.format.name, filters, frame.time_base)
        graph.push(frame)
        return graph.pull().to_ndarray()


def upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Returns height and width of a frame once it is upright."""
    is_sideways = any(name == "transpose" for name, _ in upright_filters(display_matrix(frame)))
    return (frame.width, frame.height) if is_sideways else (frame.height, frame.width)


def display_matrix(frame: av.VideoFrame) -> Sequence[int]:
    """Returns the nine numbers that map a stored frame to the display: four of them rotate and mirror."""
    try:
        stored = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # the frame has side data that this PyAV has no name for; it still knows the rotation
        angle = math.radians(frame.rotation)
        cos, sin = round(math.cos(angle) * _ONE), round(math.sin(angle) * _ONE)
        return (cos, -sin, 0, sin, cos, 0, 0, 0, 1 << 30)
    return _UPRIGHT if stored is None else np.frombuffer(stored, np.int32)[:9].tolist()


def upright_filters(matrix: Sequence[int]) -> list[Filter]:
    """Returns the filters, with their arguments, that turn and mirror a frame as its display matrix says."""
    a, b, _, c, d = matrix[:5]
    x_scale, y_scale = math.hypot(a, c), math.hypot(b, d)
    if not x_scale or not y_scale:
        return []
    angle = round(math.degrees(math.atan2(b / y_scale, a / x_scale))) % 360
    if angle == 90:
        return [("transpose", "cclock_flip" if c > 0 else "clock")]
    if angle == 180:
        return [(name, None) for name, is_mirrored in (("hflip", a < 0), ("vflip", d < 0)) if is_mirrored]
    if angle == 270:
        return [("transpose", "clock_flip" if c < 0 else "cclock")]
    if angle > 1:
        return [("rotate", f"{angle}*PI/180")]
    return [("vflip", None)] if d < 0 else []


def _graph(
    width: int, height: int, pixel_format: str, filters: Sequence[Filter], time_base: Fraction | None
) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = av.VideoFormat(pixel_format)
    nodes = [graph.add_buffer(width=width, height=height, format=source, time_base=time_base or Fraction(1))]
    nodes += [graph.add(*step) for step in filters]
    nodes += [graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    return graph
