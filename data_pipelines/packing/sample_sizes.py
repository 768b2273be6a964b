"""Sizes of all samples of a data set in a packed row, as arrays, computed from their lengths alone."""

import dataclasses
import itertools
from collections.abc import Collection, Sequence

import numpy as np

from data_pipelines.packing.lengths import BAD, SampleLengths, compute_sample_size
from data_pipelines.sample_errors import BadSampleError, SampleError
from data_pipelines.settings import DataSettings


@dataclasses.dataclass
class SampleSizes:
    """Sizes of n samples, bad ones included.

    Attributes:
      tokens: [n] int32, text and vision tokens.
      vision_tokens: [n] int32.
      patches: [n] int32.
      usable: [n] bool; the others are bad, or too long for a row even at the smallest size of their media.
      frames: `SampleSize.frames` of each sample; None unless the settings have several vision rows.
      shrunk: Number of samples with fewer vision tokens than the settings allow.
      cut: Number of samples that are cut at their end.
      cut_tokens: Total number of tokens cut off, at most.
      errors: Errors of the samples that are too long.
    """

    tokens: np.ndarray
    vision_tokens: np.ndarray
    patches: np.ndarray
    usable: np.ndarray
    frames: list[tuple[tuple[int, int], ...]] | None = None
    shrunk: int = 0
    cut: int = 0
    cut_tokens: int = 0
    errors: list[SampleError] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


def compute_sample_sizes(lengths: Collection[SampleLengths], settings: DataSettings, name: str = "data") -> SampleSizes:
    """Applies `lengths.compute_sample_size` to each sample.

    Args:
      lengths: The lengths of the samples, such as an `Index`.
      settings: The data settings.
      name: Name of the data set, for error messages.
    """
    count = len(lengths)
    array = np.zeros((count, 3), np.int32)
    frames = [()] * count if settings.shape.vision_rows > 1 else None
    sizes = SampleSizes(array[:, 0], array[:, 1], array[:, 2], np.zeros(count, bool), frames)
    for number, sample in enumerate(lengths):
        if sample.text == BAD:
            continue
        try:
            size = compute_sample_size(sample, settings)
        except BadSampleError as error:
            sizes.errors.append(error.at(f"{name}, sample {number + 1}"))
            continue
        array[number] = size.tokens, size.vision_tokens, size.patches
        if frames is not None:
            frames[number] = size.frames
        sizes.usable[number] = True
        sizes.shrunk += size.shrunk
        sizes.cut += size.cut > 0
        sizes.cut_tokens += size.cut
    return sizes


def concatenate(parts: Sequence[SampleSizes]) -> SampleSizes:
    """Concatenates the sizes of several data sets in order."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(SampleSizes)}
    return SampleSizes(
        **{name: np.concatenate(columns[name]) for name in ("tokens", "vision_tokens", "patches", "usable")},
        frames=None if None in columns["frames"] else list(itertools.chain(*columns["frames"])),
        **{name: sum(columns[name]) for name in ("shrunk", "cut", "cut_tokens")},
        errors=list(itertools.chain(*columns["errors"])),
    )
