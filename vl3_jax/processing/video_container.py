"""Opens the container of a video with FFmpeg: only real media, nothing beside the file, frames of a bounded size."""

import contextlib
import io
import os
from collections.abc import Iterator

import av
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError
from av.stream import Disposition

from vl3_jax.errors import InputError

# The demuxers that may read a video. All of them parse the bytes of one file and nothing else: what names other files
# or addresses (playlists, `concat`, DASH, SDP, image patterns), runs scripts or opens devices is none of them. Those
# without pictures are there so that a sound file is told from a broken one.
CONTAINERS = (
    *("mov", "matroska", "avi", "flv", "live_flv", "mpegts", "mpeg", "ogg", "asf", "mxf", "rm", "nut", "dv", "gxf"),
    *("wtv", "nsv", "dhav", "ivf", "obu", "av1", "h264", "hevc", "vvc", "m4v", "mpegvideo", "mjpeg", "vc1"),
    *("yuv4mpegpipe", "aac", "ac3", "aiff", "amr", "ape", "au", "caf", "eac3", "flac", "mp3", "wav", "wv"),
)
PROTOCOLS = ()  # the file is read here; FFmpeg itself opens nothing
MAX_FRAME_PIXELS = 2**25  # 8K; decoders hold a dozen frames and more
# What PyAV raises, beside errors of FFmpeg, at files of which it makes no sense.
_MEDIA_ERRORS = (FFmpegError, OSError, EOFError, ValueError, ArithmeticError, LookupError, RuntimeError, AssertionError)
_SEEN_PICTURES, _DEFAULT = 100_000_000, 5_000_000  # weights of FFmpeg's choice of a stream, beside its pixels


@contextlib.contextmanager
def media_errors(name: str) -> Iterator[None]:
    """Turns whatever a media library raises into an `InputError` that begins with `name`."""
    try:
        yield
    except InputError:
        raise
    except _MEDIA_ERRORS as error:
        raise InputError(f"{name}: damaged video ({_reason(error)}); replace the file") from error


@contextlib.contextmanager
def open_container(source: str | bytes, name: str) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Opens a video file, given as a path or as its bytes, and chooses its video stream.

    The content alone decides what the file is, whatever its name ends with.

    Raises:
      InputError: The file may not be read, is no video of a kind in `CONTAINERS`, has no pictures, no decoder, or
        frames of more than `MAX_FRAME_PIXELS`.
    """
    with _open_file(source, name) as file:
        try:
            container = av.open(
                file,
                "r",
                options={
                    "format_whitelist": ",".join(CONTAINERS),
                    "protocol_whitelist": ",".join(PROTOCOLS),
                    "max_pixels": str(MAX_FRAME_PIXELS),
                    "fflags": "-genpts",  # the times of the file, as the `ffmpeg` program reads them
                },
                metadata_errors="replace",
            )
        except ArgumentError as error:
            raise InputError(
                f"{name}: not a video file; playlists, scripts and pictures are not opened as videos, so give a video "
                "such as MP4, MKV or WebM"
            ) from error
        except _MEDIA_ERRORS as error:
            raise InputError(f"{name}: not a readable video ({_reason(error)}); replace the file") from error
        with container:
            stream = _best_stream(container, name)
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # frames may grow on the way
            yield container, stream


def stored_packets(container: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Yields the packets of a stream up to the end of the file, or to where it cannot be read any further."""
    # PyAV raises LookupError at the end of a file in which a track appears on the way.
    with contextlib.suppress(FFmpegError, OSError, LookupError):
        yield from (packet for packet in container.demux(stream) if packet.size)


def _open_file(source: str | bytes, name: str) -> io.BufferedIOBase:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        # A file of a descriptor has no name, from which FFmpeg would guess the format.
        return open(os.open(source, os.O_RDONLY), "rb")
    except PermissionError as error:
        raise InputError(f"{name}: no permission to read it; change its permissions") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); check the path") from error


def _best_stream(container: InputContainer, name: str) -> av.VideoStream:
    """Returns the stream that the `ffmpeg` program takes: the default one of those with pictures, then the largest."""
    streams = [s for s in container.streams.video if not Disposition.attached_pic & s.disposition]
    if not streams:
        only_sound = " (sound only)" if container.streams.audio else ""
        raise InputError(f"{name}: has no video{only_sound}; give a file with a video track")
    streams = [stream for stream in streams if stream.codec_context is not None]
    if not streams:
        raise InputError(f"{name}: no decoder for its video track; convert it to H.264 in MP4")
    stream = max(streams, key=_score)  # the first of equals
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_FRAME_PIXELS:
        raise InputError(
            f"{name}: frames of {width} x {height} pixels are too large to decode (limit {MAX_FRAME_PIXELS:,} pixels); "
            "scale the video down"
        )
    return stream


def _score(stream: av.VideoStream) -> int:
    codec = stream.codec_context
    has_pictures = codec.pix_fmt is not None
    is_default = bool(Disposition.default & stream.disposition)
    return codec.width * codec.height + _SEEN_PICTURES * has_pictures + _DEFAULT * is_default


def _reason(error: Exception) -> str:
    """Returns what an error says, in one line."""
    text = error.strerror if isinstance(error, FFmpegError | OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
