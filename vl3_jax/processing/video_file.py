"""Reads video files with FFmpeg (PyAV), yielding exactly the frames of the reference's `ffmpeg` process."""

import contextlib
import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import NoReturn

import av
from av.container import InputContainer
from av.error import FFmpegError
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing import frame_table
from vl3_jax.processing.file_selection import select_frames
from vl3_jax.processing.frame_selection import FrameSelection
from vl3_jax.processing.frame_table import FrameTable, PacketTable
from vl3_jax.processing.upright_rgb import UprightRgb, upright_size
from vl3_jax.processing.video_container import media_errors, open_container, stored_packets
from vl3_jax.processing.video_reader import FrameSamplingOptions, PlanChangedError, VideoReader

_MAX_MISSING_SECONDS = 0.5  # missing at the end; with more, a file counts as truncated
_SINGLE_THREAD_PIXELS = 200_000  # in a frame; below, passing frames between threads costs more than it gains
_FEW_THREADS_PIXELS = 10_000_000  # in a frame; above, each thread holds so much memory that only a few are used
_FEW_THREADS = 4
# Codecs with non-reference frames, on which no other frame depends, so that unwanted ones need no decoding.
_SKIPPABLE = ("h264", "mpeg4", "mpeg2video", "mpeg1video")


class FileVideoReader(VideoReader):
    """Reads a file that FFmpeg can open; frame times are read at once, frames are decoded on request."""

    def __init__(self, source: str | bytes, name: str, options: FrameSamplingOptions):
        self.name, self.warnings = name, []
        self._source, self._options = source, options
        # After the window, one tick and one second more, no frame is needed.
        self._scan_limit = None if options.end is None else options.end + 1 / options.fps + 1
        with media_errors(name):
            with self._open_stream(threads=1) as (container, stream):
                self._table, first_frame = frame_table.scan_packets(container, stream, self._scan_limit)
            if first_frame is None:
                raise InputError(f"{name}: no frame could be decoded; replace the file")
            self.height, self.width = upright_size(first_frame)
            if not self._table.starts:
                self._table = self._scan_by_decoding()
            self.selection = self._select()
        stated, seconds = self._table.header_seconds, self._table.seconds
        if self._table.complete and stated is not None and stated - seconds > _MAX_MISSING_SECONDS:
            self.warnings.append(f"{name}: cut off or damaged; the first {seconds:.2f} s of {stated:.2f} s are used")

    @property
    def frame_times(self) -> Sequence[float]:
        return [self._table.seconds_at(start) for start in self._table.starts]

    def decode(self, indices: Sequence[int]) -> Generator[tuple[int, Image.Image]]:
        table, wanted, to_rgb = self._table, set(indices), UprightRgb()
        with media_errors(self.name), self._open_stream() as (container, stream):
            if table.packets is None:
                timed = enumerate(frame_table.timed_frames(container, stream))
                numbered = ((index, frame) for index, (_, frame) in timed)
            else:
                index_at: dict[int | None, int] = {table.starts[index]: index for index in indices}
                decoded = _decode_at(container, stream, table.packets, [table.starts[index] for index in indices])
                numbered = ((index_at.get(frame.pts, -1), frame) for frame in decoded)
            for index, frame in numbered:
                if index in wanted:
                    yield index, Image.fromarray(to_rgb(frame))
                if index == indices[-1]:
                    return

    def _plan_anew(self) -> NoReturn:
        if self._table.packets is None:
            super()._plan_anew()
        with media_errors(self.name):
            self._table = self._scan_by_decoding()
            self.selection = self._select()
        count = len(self._table.starts)
        self.warnings.append(f"{self.name}: damaged; {count} frames could be decoded and are used")
        raise PlanChangedError(self.name)

    @contextlib.contextmanager
    def _open_stream(self, threads: int | None = None) -> Iterator[tuple[InputContainer, av.VideoStream]]:
        with open_container(self._source, self.name) as (container, stream):
            threads = self._threads() if threads is None else threads
            stream.thread_type = "NONE" if threads == 1 else "AUTO"
            stream.codec_context.thread_count = threads
            yield container, stream

    def _threads(self) -> int:
        pixels = self.height * self.width
        if self._options.threads or pixels < _SINGLE_THREAD_PIXELS:
            return self._options.threads or 1
        return _FEW_THREADS if pixels > _FEW_THREADS_PIXELS else 0

    def _scan_by_decoding(self) -> FrameTable:
        with self._open_stream() as (container, stream):
            table = frame_table.scan_frames(container, stream, self._scan_limit)
        if not table.starts:
            raise InputError(f"{self.name}: no frame could be decoded; replace the file")
        return table

    def _select(self) -> FrameSelection:
        return select_frames(self._table, self._options, self.name)


def _decode_at(
    container: InputContainer, stream: av.VideoStream, packets: PacketTable, wanted: Sequence[int]
) -> Iterator[av.VideoFrame]:
    """Decodes the packet ranges that hold the frames at the wanted times; also yields other frames of these ranges.

    Frames have the times of the table, whatever the packets state.
    """
    codec = stream.codec_context
    skippable, needed, setups = codec.name in _SKIPPABLE, set(wanted), set(packets.setups)
    stored, position = stored_packets(container, stream), 0
    for first, last in frame_table.packet_ranges(packets, wanted):
        stretch = itertools.islice(stored, first - position, last + 1 - position)
        for number, packet in enumerate(stretch, first):
            packet.pts = packets.times[number]
            if skippable:
                codec.skip_frame = "DEFAULT" if packet.pts in needed or number in setups else "NONREF"
            with contextlib.suppress(FFmpegError, EOFError):
                yield from packet.decode()
        position = last + 1
        with contextlib.suppress(FFmpegError, EOFError):
            yield from codec.decode(None)
        codec.flush_buffers()
