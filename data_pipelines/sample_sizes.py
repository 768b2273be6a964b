"""What every sample of a data set takes of a row, as arrays, from its index alone."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.index import BAD, Index
from data_pipelines.lengths import SampleLengths, SampleSize, compute_sample_size
from data_pipelines.sample_errors import BadSampleError, SampleError
from data_pipelines.settings import DataSettings


@dataclasses.dataclass
class SampleSizes:
    """Of n samples, bad ones included.

    Attributes:
      tokens: [n] int32.
      vision_tokens: [n] int32.
      patches: [n] int32.
      usable: [n] bool; the others are bad, or do not fit a row however shrunk.
      frames: `Room.frames` of each, only for settings with several vision rows.
      shrunk: how many samples were given fewer vision tokens than the settings grant.
      cut: how many are cut at their end.
      cut_tokens: tokens that this loses, at most.
      problems: of those that do not fit.
    """

    tokens: np.ndarray
    vision_tokens: np.ndarray
    patches: np.ndarray
    usable: np.ndarray
    frames: list[tuple[tuple[int, int], ...]] | None = None
    shrunk: int = 0
    cut: int = 0
    cut_tokens: int = 0
    problems: list[SampleError] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


def compute_sample_sizes(
    index: Index | Sequence[SampleLengths], settings: DataSettings, name: str = "data"
) -> SampleSizes:
    """Applies the length rule (`lengths.room`) to each sample; `name` is for problems."""
    count = len(index)
    sizes = np.zeros((count, 3), np.int32)
    found = SampleSizes(sizes[:, 0], sizes[:, 1], sizes[:, 2], np.zeros(count, bool))
    several = settings.shape.vision_rows > 1
    frames: list[tuple[tuple[int, int], ...]] = []
    for number, lengths in enumerate(index):
        place = None
        if lengths.text != BAD:
            try:
                place = compute_sample_size(lengths, settings)
            except BadSampleError as error:
                found.problems.append(error.at(f"{name}, sample {number + 1}"))
        if several:
            frames.append(() if place is None else place.frames)
        if place is not None:
            _note(found, number, place, sizes)
    found.frames = frames if several else None
    return found


def concatenate(sample_sizes: Sequence[SampleSizes]) -> SampleSizes:
    """Several data sets as one, in order."""

    def array(name: str) -> np.ndarray:
        return np.concatenate([getattr(one, name) for one in sample_sizes])

    several = any(one.frames is not None for one in sample_sizes)
    return SampleSizes(
        array("tokens"),
        array("vision_tokens"),
        array("patches"),
        array("usable"),
        [frames for one in sample_sizes for frames in one.frames or ()] if several else None,
        sum(one.shrunk for one in sample_sizes),
        sum(one.cut for one in sample_sizes),
        sum(one.cut_tokens for one in sample_sizes),
        [problem for one in sample_sizes for problem in one.problems],
    )


def _note(found: SampleSizes, number: int, place: SampleSize, sizes: np.ndarray) -> None:
    sizes[number] = place.tokens, place.vision_tokens, place.patches
    found.usable[number] = True
    found.shrunk += place.shrunk
    found.cut += place.cut > 0
    found.cut_tokens += place.cut
