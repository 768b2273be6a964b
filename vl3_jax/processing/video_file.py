"""Reads video files with FFmpeg (PyAV), yielding exactly the frames of the reference's `ffmpeg` process."""

import bisect
import collections
import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import av.filter
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing import frame_selection, frame_table
from vl3_jax.processing.frame_selection import FrameSelection
from vl3_jax.processing.frame_table import FrameTable
from vl3_jax.processing.media_source import as_file
from vl3_jax.processing.video_reader import FrameSamplingOptions, PlanChangedError, VideoReader

_MAX_MISSING_SECONDS = 0.5  # missing at the end; with more, a file counts as truncated
_SINGLE_THREAD_PIXELS = 200_000  # in a frame; below, passing frames between threads costs more than it gains
# Codecs with non-reference frames, on which no other frame depends, so that unwanted ones need no decoding.
_SKIPPABLE = ("h264", "mpeg4", "mpeg2video", "mpeg1video")
_ROTATION_FILTERS = {
    90: [("transpose", "cclock")],
    180: [("hflip", None), ("vflip", None)],
    270: [("transpose", "clock")],
}


class FileVideoReader(VideoReader):
    """Reads a file that FFmpeg can open; frame times are read at once, frames are decoded on request."""

    def __init__(self, source: str | bytes, name: str, options: FrameSamplingOptions):
        self.name, self.warnings = name, []
        self._source, self._options = source, options
        # After the window, one tick and one second more, no frame is needed.
        scan_limit = None if options.end is None else options.end + 1 / options.fps + 1
        with self._open_stream(threads=1) as (container, stream):
            self._table, first_frame = frame_table.scan_packets(container, stream, scan_limit)
        if first_frame is None:
            raise InputError(f"{name}: no frame could be decoded; replace the file")
        size = (first_frame.height, first_frame.width)
        self.height, self.width = size[::-1] if _rotation(first_frame) in (90, 270) else size
        if not self._table.starts:
            self._table = self._scan_by_decoding()
        self.selection = self._select()
        stated, seconds = self._table.header_seconds, self._table.seconds
        if self._table.complete and stated is not None and stated - seconds > _MAX_MISSING_SECONDS:
            self.warnings.append(f"{name}: cut off or damaged; the first {seconds:.2f} s of {stated:.2f} s are used")

    def frames(self) -> Iterator[Image.Image]:
        missing = collections.Counter(self.indices)
        for index, frame in self._decode_frames(list(missing)):
            if index != next(iter(missing)):
                break
            yield from [Image.fromarray(frame)] * missing.pop(index)
        if missing:
            if self._table.packets is None:
                raise InputError(f"{self.name}: decodes differently each time; replace the file")
            self._table = self._scan_by_decoding()
            self.selection = self._select()
            count = len(self._table.starts)
            self.warnings.append(f"{self.name}: damaged; {count} frames could be decoded and are used")
            raise PlanChangedError(self.name)

    @contextlib.contextmanager
    def _open_stream(self, threads: int | None = None) -> Iterator[tuple[InputContainer, av.VideoStream]]:
        try:
            container = av.open(as_file(self._source), "r", metadata_errors="replace")
        except (FFmpegError, OSError, ValueError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise InputError(f"{self.name}: not a readable video ({reason}); convert it to MP4") from error
        with container:
            streams = [s for s in container.streams.video if "attached_pic" not in str(s.disposition)]
            if not streams:
                raise InputError(f"{self.name}: has no video track (sound only?); give a file with one")
            stream = streams[0]
            if stream.codec_context is None:
                raise InputError(f"{self.name}: no decoder for its video track; convert it to H.264 in MP4")
            if threads is None:
                threads = self._options.threads or (1 if self.height * self.width < _SINGLE_THREAD_PIXELS else 0)
            stream.thread_type = "NONE" if threads == 1 else "AUTO"
            stream.codec_context.thread_count = threads
            yield container, stream

    def _scan_by_decoding(self) -> FrameTable:
        with self._open_stream() as (container, stream):
            table = frame_table.scan_frames(container, stream)
        if not table.starts:
            raise InputError(f"{self.name}: no frame could be decoded; replace the file")
        return table

    def _select(self) -> FrameSelection:
        table, options = self._table, self._options
        options.check_start(self.name, table.seconds)
        if options.by_index:
            selection = options.select_at_constant_rate(len(table.starts), table.rate)
        else:
            selection = _select_by_ticks(table, options).capped(options.max_frames)
        return selection if selection.indices else _middle_frame(table, options)

    def _decode_frames(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index, [h, w, 3] uint8) for these ascending indices; stops early when one cannot be decoded."""
        table, wanted = self._table, set(indices)
        graph_for = functools.lru_cache(maxsize=1)(_rgb_graph)
        with self._open_stream() as (container, stream):
            if table.packets is None:
                numbered = enumerate(frame_table.decoded_frames(container, stream))
            else:
                index_at: dict[int | None, int] = {table.starts[index]: index for index in indices}
                decoded = _decode_at(container, stream, table.packets, [table.starts[index] for index in indices])
                numbered = ((index_at.get(frame.pts, -1), frame) for frame in decoded)
            for index, frame in numbered:
                if index in wanted:
                    graph = graph_for(frame.width, frame.height, frame.format.name, _rotation(frame), frame.time_base)
                    graph.push(frame)
                    yield index, graph.pull().to_ndarray()
                if index == indices[-1]:
                    return


def _select_by_ticks(table: FrameTable, options: FrameSamplingOptions) -> FrameSelection:
    """Applies the official rule to the whole file, or to a window whose ticks start at the start of the window."""
    time_base, fps = table.time_base, options.exact_fps
    label_start = float(table.stream_start)
    if options.start is None and options.end is None:
        origin = _round(table.container_start / time_base)
        starts = [start - origin for start in table.starts]
        return frame_selection.by_ticks(starts, table.end - origin, time_base, fps, label_start)
    window_start = max(Fraction(options.start or 0), table.stream_start)
    if options.precise_time:
        return _select_by_absolute_ticks(table, options, window_start)
    origin = _round(window_start / time_base)
    first, last = _window(table, options)
    # FFmpeg ends a window that lies inside the file at the start of the next frame.
    end = table.starts[last] if last < len(table.starts) else table.end
    starts = [start - origin for start in table.starts[first:last]]
    selection = frame_selection.by_ticks(starts, end - origin, time_base, fps, float(window_start), first)
    if options.end is None:
        return selection
    count = math.ceil((Fraction(options.end) - window_start) * fps + 1)
    return selection.at(range(len(selection.indices))[:count])


def _select_by_absolute_ticks(
    table: FrameTable, options: FrameSamplingOptions, window_start: Fraction
) -> FrameSelection:
    """Selects the window's part of the ticks anchored at the start of the file; labels still start with the window.

    As in FFmpeg, start and length are rounded to whole ticks, and a first tick that is half a tick late is repeated.
    """
    fps = options.exact_fps
    origin = _round(table.container_start / table.time_base)
    starts = [start - origin for start in table.starts]
    whole = frame_selection.by_ticks(starts, table.end - origin, table.time_base, fps, 0.0)
    first = _round(window_start * fps)
    indices = whole.indices[first:]
    if indices and first - window_start * fps == Fraction(1, 2):
        indices = indices[:1] + indices
    if options.end is not None:
        indices = indices[: _round((Fraction(options.end) - window_start) * fps)]
    return FrameSelection(indices, frame_selection.tick_labels(len(indices), fps, float(window_start)))


def _middle_frame(table: FrameTable, options: FrameSamplingOptions) -> FrameSelection:
    """Selects the middle frame of a window too short for a tick of its own, labelled with the window's start."""
    first, last = _window(table, options)
    if last <= first:  # between two frames: the one on display
        first, last = max(first - 1, 0), max(first, 1)
    label = options.start if options.start is not None else float(table.stream_start)
    return FrameSelection([(first + last) // 2 if last - first > 1 else first], [label])


def _window(table: FrameTable, options: FrameSamplingOptions) -> tuple[int, int]:
    """Returns the index of the window's first frame and of the first frame after the window.

    The length of the window counts from the start of its first frame.
    """
    window_start = max(Fraction(options.start or 0), table.stream_start)
    first = 0 if options.start is None else bisect.bisect_left(table.starts, _round(window_start / table.time_base))
    if options.end is None or first == len(table.starts):
        return first, len(table.starts)
    stop = table.starts[first] + _round((Fraction(options.end) - window_start) / table.time_base)
    return first, bisect.bisect_left(table.starts, stop)


def _round(value: Fraction) -> int:
    """Rounds to the nearest integer, halves up, as FFmpeg rescales times."""
    return int((value + Fraction(1, 2)) // 1)


def _decode_at(
    container: InputContainer, stream: av.VideoStream, packets: Sequence[tuple[int, bool]], wanted: Sequence[int]
) -> Iterator[av.VideoFrame]:
    """Decodes the packet ranges that hold the frames at the wanted times; also yields other frames of these ranges."""
    codec = stream.codec_context
    skippable = codec.name in _SKIPPABLE
    stored = (packet for packet in container.demux(stream) if packet.size)
    position = 0
    with contextlib.suppress(FFmpegError, EOFError, OSError):
        for first, last in frame_table.packet_ranges(packets, wanted):
            for packet in itertools.islice(stored, first - position, last + 1 - position):
                if skippable:
                    codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                with contextlib.suppress(InvalidDataError):
                    yield from packet.decode()
            position = last + 1
            yield from codec.decode(None)
            codec.flush_buffers()
        return
    with contextlib.suppress(FFmpegError, EOFError):
        yield from codec.decode(None)


def _rotation(frame: av.VideoFrame) -> int:
    """Returns the rotation of a frame in degrees: 0, 90, 180 or 270."""
    return round(frame.rotation / 90) * 90 % 360


def _rgb_graph(
    width: int, height: int, pixel_format: str, rotation: int, time_base: Fraction | None
) -> av.filter.Graph:
    """Returns FFmpeg's filters that convert frames to upright RGB, so that the pixels equal those of the reference."""
    graph = av.filter.Graph()
    source = av.VideoFormat(pixel_format)
    nodes = [graph.add_buffer(width=width, height=height, format=source, time_base=time_base or Fraction(1))]
    nodes += [graph.add(*step) for step in _ROTATION_FILTERS.get(rotation, [])]
    nodes += [graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    return graph
