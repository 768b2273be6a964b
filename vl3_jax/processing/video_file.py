"""Video files through FFmpeg (PyAV): the very frames that the reference's `ffmpeg` process hands over."""

import bisect
import contextlib
import io
import math
import os
from collections.abc import Iterator
from fractions import Fraction

import av
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing import frame_selection, frame_table
from vl3_jax.processing.frame_table import FrameTable
from vl3_jax.processing.video_reader import FrameSamplingOptions, PlanChangedError, VideoReader

_INDEX_BASED_BELOW = 1  # second; shorter windows take frames by index, as the reference does
_SHORT_BY = 0.5  # seconds missing at the end before a file is called cut off
_SMALL = 200_000  # pixels in a frame; below, handing frames between threads costs more than it gains
# Codecs whose non-reference frames nothing depends on, so that unwanted ones need no decoding.
_SKIPPABLE = ("h264", "mpeg4", "mpeg2video", "mpeg1video")
_TURNS = {90: [("transpose", "cclock")], -90: [("transpose", "clock")], 180: [("hflip", None), ("vflip", None)]}


class FileVideoReader(VideoReader):
    """A file that FFmpeg opens. Its timing is read at once, its frames when asked for."""

    def __init__(self, source: str | bytes, name: str, options: FrameSamplingOptions):
        self.name, self.notes = name, []
        self._source, self._options = source, options
        with self._opened(threads=1) as (container, stream):
            self._table, first = frame_table.scan_packets(container, stream, self._no_need_beyond())
        if first is None:
            raise InputError(f"{name}: no picture in it could be decoded; replace the file")
        turned = _rotation(first) in (90, -90)
        self.height, self.width = (first.width, first.height) if turned else (first.height, first.width)
        if not self._table.starts:
            self._table = self._decoded_table()
        self._select()
        self._note_missing_end()

    def frames(self) -> Iterator[Image.Image]:
        """See `Clip.frames`."""
        position = 0
        for index, frame in self._decoded(sorted(set(self.indices))):
            if index != self.indices[position]:
                break
            image = Image.fromarray(frame)
            while position < len(self.indices) and self.indices[position] == index:
                yield image
                position += 1
        if position < len(self.indices):
            if self._table.packets is None:
                raise InputError(f"{self.name}: decodes differently each time; replace the file")
            self._table = self._decoded_table()
            self._select()
            self.notes.append(f"{self.name}: damaged; {len(self._table.starts)} frames could be decoded and are used")
            raise PlanChangedError(self.name)

    @contextlib.contextmanager
    def _opened(self, threads: int | None = None):
        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else os.fspath(self._source)
        try:
            container = av.open(source, metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise InputError(f"{self.name}: not a video that can be read ({reason}); convert it to MP4") from error
        with container:
            streams = [s for s in container.streams.video if "attached_pic" not in str(s.disposition)]
            if not streams:
                raise InputError(f"{self.name}: has no pictures (sound only?); give a file with a video track")
            stream = streams[0]
            if stream.codec_context is None:
                raise InputError(f"{self.name}: no decoder for its video track; convert it to H.264 in MP4")
            if threads is None:
                threads = self._options.threads or (1 if self.height * self.width < _SMALL else 0)
            stream.thread_type = "NONE" if threads == 1 else "AUTO"
            stream.codec_context.thread_count = threads
            yield container, stream

    def _no_need_beyond(self) -> float | None:
        """Seconds after which no frame matters: the window and the tick it ends in."""
        return None if self._options.end is None else self._options.end + 1 / self._options.fps + 1

    def _decoded_table(self) -> FrameTable:
        with self._opened() as (container, stream):
            table = frame_table.scan_frames(container, stream)
        if not table.starts:
            raise InputError(f"{self.name}: no picture in it could be decoded; replace the file")
        return table

    def _note_missing_end(self) -> None:
        promised, found = self._table.promised_seconds, self._table.seconds
        if self._table.complete and promised is not None and promised - found > _SHORT_BY:
            self.notes.append(f"{self.name}: cut off or damaged; the first {found:.2f} s of {promised:.2f} s are used")

    def _select(self) -> None:
        table, options = self._table, self._options
        if options.start is not None and options.start >= table.seconds:
            raise InputError(f"{self.name}: start {options.start} s is not before its end at {table.seconds:.2f} s")
        if options.preprocess == "native":
            total = len(table.starts)
            chosen = frame_selection.native(
                total, table.rate, options.fps, options.max_frames, start=options.start, end=options.end
            )
        elif None not in (options.start, options.end) and options.end - options.start < _INDEX_BASED_BELOW:
            chosen = frame_selection.by_index(
                len(table.starts), table.rate, options.fps, options.max_frames, options.start, options.end
            )
        else:
            chosen = _by_ticks(table, options).capped(options.max_frames)
        if not chosen.indices:
            chosen = _middle_frame(table, options)
        self.indices, self.timestamps = chosen.indices, chosen.timestamps

    def _decoded(self, indices: list[int]) -> Iterator[tuple[int, object]]:
        """The frames of these ascending indices as (index, [h, w, 3] uint8); stops early when some cannot be had."""
        to_rgb = _RgbConverter()
        table, wanted = self._table, set(indices)
        with self._opened() as (container, stream):
            if table.packets is None:
                for index, frame in enumerate(frame_table.decoded_frames(container, stream)):
                    if index in wanted:
                        yield index, to_rgb(frame)
                    if index >= indices[-1]:
                        return
                return
            index_at = {table.starts[index]: index for index in indices}
            for frame in _frames_at(container, stream, table.packets, index_at):
                if frame.pts in index_at:
                    yield index_at[frame.pts], to_rgb(frame)
                    if index_at[frame.pts] == indices[-1]:
                        return


def _by_ticks(table: FrameTable, options: FrameSamplingOptions) -> frame_selection.FrameSelection:
    """The official rule over the whole file, or over a window whose ticks begin at its start."""
    unit, fps = table.unit, options.exact_fps
    label_start = float(table.stream_start)
    if options.start is None and options.end is None:
        origin = _round(table.container_start / unit)
        starts = [start - origin for start in table.starts]
        return frame_selection.by_ticks(starts, table.end - origin, unit, fps, label_start)
    begin = max(Fraction(options.start or 0), table.stream_start)
    if options.precise_time:
        return _on_absolute_ticks(table, options, begin)
    origin = _round(begin / unit)
    first, last = _window(table, options)
    # A window that ends inside the file ends for FFmpeg with the next frame.
    end = table.starts[last] if last < len(table.starts) else table.end
    starts = [start - origin for start in table.starts[first:last]]
    chosen = frame_selection.by_ticks(starts, end - origin, unit, fps, float(begin))
    count = len(chosen.indices)
    if options.end is not None:
        count = min(count, math.ceil((Fraction(options.end) - begin) * fps + 1))
    return frame_selection.FrameSelection(
        [first + index for index in chosen.indices[:count]], chosen.timestamps[:count]
    )


def _on_absolute_ticks(
    table: FrameTable, options: FrameSamplingOptions, begin: Fraction
) -> frame_selection.FrameSelection:
    """Ticks anchored at the beginning of the file, those in the window; their labels still begin at its start.

    Start and length are rounded to whole ticks, and a first tick that is half a tick late is repeated: so does FFmpeg.
    """
    fps = options.exact_fps
    origin = _round(table.container_start / table.unit)
    starts = [start - origin for start in table.starts]
    whole = frame_selection.by_ticks(starts, table.end - origin, table.unit, fps, 0.0)
    first = _round(begin * fps)
    picks = whole.indices[first:]
    if picks and first - begin * fps == Fraction(1, 2):
        picks = picks[:1] + picks
    if options.end is not None:
        picks = picks[: _round((Fraction(options.end) - begin) * fps)]
    return frame_selection.FrameSelection(picks, frame_selection.tick_labels(len(picks), fps, float(begin)))


def _middle_frame(table: FrameTable, options: FrameSamplingOptions) -> frame_selection.FrameSelection:
    """For a window too short for any frame of its own: the frame in its middle, labelled with its start."""
    first, last = _window(table, options)
    if last <= first:  # between two frames: the one on display
        first, last = max(first - 1, 0), max(first, 1)
    label = options.start if options.start is not None else float(table.stream_start)
    return frame_selection.FrameSelection([(first + last) // 2 if last - first > 1 else first], [label])


def _window(table: FrameTable, options: FrameSamplingOptions) -> tuple[int, int]:
    """First frame in the window and the first behind it, whose length counts from the former."""
    begin = max(Fraction(options.start or 0), table.stream_start)
    first = 0 if options.start is None else bisect.bisect_left(table.starts, _round(begin / table.unit))
    if options.end is None or first == len(table.starts):
        return first, len(table.starts)
    stop = table.starts[first] + _round((Fraction(options.end) - begin) / table.unit)
    return first, bisect.bisect_left(table.starts, stop)


def _round(value: Fraction) -> int:
    """To the nearest, halves up, as FFmpeg rescales times."""
    return int((value + Fraction(1, 2)) // 1)


def _frames_at(container, stream, packets, index_at) -> Iterator[av.VideoFrame]:
    """Decodes the stretches that hold the wanted frames (and yields unwanted ones of them too)."""
    codec = stream.codec_context
    stretches = frame_table.runs(packets, list(index_at))
    skippable = codec.name in _SKIPPABLE
    number, stretch = -1, 0
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            number += 1
            first, last = stretches[stretch]
            if number < first:
                continue
            if skippable:
                codec.skip_frame = "DEFAULT" if packet.pts in index_at else "NONREF"
            with contextlib.suppress(av.InvalidDataError):
                yield from packet.decode()
            if number == last:
                yield from codec.decode(None)
                codec.flush_buffers()
                stretch += 1
                if stretch == len(stretches):
                    return
    except (av.FFmpegError, EOFError, OSError):
        pass
    with contextlib.suppress(av.FFmpegError, EOFError):
        yield from codec.decode(None)


def _rotation(frame: av.VideoFrame) -> int:
    rotation = round(frame.rotation / 90) * 90 % 360
    return rotation - 360 if rotation > 180 else rotation


class _RgbConverter:
    """Turns a frame upright and into RGB with FFmpeg's own filters, whose arithmetic the reference's pixels have."""

    def __init__(self):
        self._graph, self._made_for = None, None

    def __call__(self, frame: av.VideoFrame):
        kind = (frame.width, frame.height, frame.format.name, _rotation(frame))
        if kind != self._made_for:
            self._graph, self._made_for = self._build(frame), kind
        self._graph.push(frame)
        return self._graph.pull().to_ndarray()

    @staticmethod
    def _build(frame: av.VideoFrame) -> av.filter.Graph:
        graph = av.filter.Graph()
        nodes = [
            graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
            )
        ]
        nodes += [graph.add(*turn) for turn in _TURNS.get(_rotation(frame), [])]
        nodes += [graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        return graph
