"""Finds the packets of a stream that set a decoder up for others: palettes, and parameter sets in the stream."""

import contextlib

import av
from av.bitstream import BitStreamFilterContext
from av.error import FFmpegError

_SIDE_DATA = ("palette", "new_extradata", "param_change")
_TO_START_CODES = {"h264": "h264_mp4toannexb,", "hevc": "hevc_mp4toannexb,", "vvc": "vvc_mp4toannexb,"}


class ParameterSetWatch:
    """Looks at the packets of a stream in decoding order."""

    def __init__(self, stream: av.VideoStream):
        self._extractor = self._last = None
        name = stream.codec_context.name
        with contextlib.suppress(FFmpegError, ValueError):  # the codec keeps no parameter sets in its stream
            self._extractor = BitStreamFilterContext(f"{_TO_START_CODES.get(name, '')}extract_extradata", stream)

    def concerns_later(self, packet: av.Packet) -> bool:
        """Returns whether later packets need this one; it is empty afterwards."""
        if any(packet.has_sidedata(kind) for kind in _SIDE_DATA):
            return True
        if self._extractor is None or not packet.is_keyframe:
            return False
        found = None
        with contextlib.suppress(FFmpegError, ValueError):
            for part in self._extractor.filter(packet):
                if part.has_sidedata("new_extradata"):
                    found = bytes(part.get_sidedata("new_extradata"))
        changed = found is not None and self._last is not None and found != self._last
        self._last = found or self._last
        return changed
