"""Frames of a video as a sequence, of which a few are in memory."""

import collections
from collections.abc import Generator, Sequence
from typing import Any, overload

from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing.video_reader import VideoReader

KEPT_FRAMES = 16  # the latest ones, which are not decoded again
_BLOCK = KEPT_FRAMES // 2  # frames that are decoded together on the way back


class VideoFrames(Sequence[Image.Image]):
    """The frames of a video, or some of them, upright and in RGB.

    Frames that are asked for in ascending order are decoded once; in descending order, several are decoded together. In
    the place of a damaged frame is one beside it, with a warning, so that all others keep their index.

    Attributes:
      reader: Reader of the video; its selection of frames does not matter.
      indices: Index of each frame in the video.
      times: Time of each frame in seconds from the beginning of the video.
    """

    def __init__(self, reader: VideoReader, indices: Sequence[int] | None = None):
        """Decodes nothing yet.

        Args:
          reader: Reader of the video.
          indices: Indices of the frames, ascending, each once; None for all frames.
        """
        times = reader.frame_times
        self.reader, self.indices = reader, range(len(times)) if indices is None else indices
        self.times = times if indices is None else [times[index] for index in indices]
        self._kept: collections.OrderedDict[int, Image.Image] = collections.OrderedDict()
        self._decoded: Generator[tuple[int, Image.Image]] | None = None
        self._coming: tuple[int, Image.Image] | None = None  # decoded, and not asked for yet
        self._next = 0

    def __len__(self) -> int:
        return len(self.times)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        index = range(len(self))[index]
        if index not in self._kept:
            goes_back = bool(self._kept) and index < min(self._kept)
            if self._decoded is None or index != self._next:
                self._begin(max(0, index - _BLOCK + 1) if goes_back else index)
            while self._next <= index:
                self._keep_next()
        return self._kept[index]

    def _begin(self, first: int) -> None:
        """Starts decoding at a frame."""
        if self._decoded is not None:
            self._decoded.close()
        self._decoded, self._coming, self._next = self.reader.decode(self.indices[first:]), None, first

    def _keep_next(self) -> None:
        """Keeps the next frame, and forgets the oldest one."""
        assert self._decoded is not None
        index = self._next
        name = f"{self.reader.name}: frame {self.indices[index]}"
        self._coming = self._coming or next(self._decoded, None)
        if self._coming is not None and self._coming[0] == self.indices[index]:
            frame, self._coming = self._coming[1], None
        else:
            frame = self._kept.get(index - 1) or (self._coming and self._coming[1])
            if frame is None:
                raise InputError(f"{name} cannot be decoded; replace the file")
            warning = f"{name} is damaged; a frame beside it is used in its place"
            if warning not in self.reader.warnings:
                self.reader.warnings.append(warning)
        self._kept.pop(index, None)
        self._kept[index] = frame
        self._next += 1
        while len(self._kept) > KEPT_FRAMES:
            self._kept.popitem(last=False)
