"""How full the rows of a step are, and of what: as measured in the proportions of stage 4 (docs/benchmarks.md)."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from data_pipelines import mixtures
from vl3_jax.processing.packed_batch import BatchShape
from vl3_jax.training.flops import StepWork

# Of rows of 16,384 tokens and 40,960 patches, whose patches are full first; FULL of rows whose tokens are.
TOKEN_FILL, PATCH_FILL, FULL = 0.69, 0.97, 0.99
SAMPLES_PER_ROW, FRAME_PATCHES, SUPERVISED = 2.35, 400, 0.15


class TypicalRow(NamedTuple):
    """A row of the usual length, which is the shortest.

    Attributes:
      shape: Its capacities.
      tokens: Tokens that are no padding.
      patches: Patches that are no padding.
      samples: Samples, on average.
      merge: Patches of a vision token.
    """

    shape: BatchShape
    tokens: int
    patches: int
    samples: float
    merge: int

    @property
    def work(self) -> StepWork:
        """What a step computes for it."""
        return StepWork(
            patches=self.patches,
            patch_pairs=self.patches * FRAME_PATCHES,
            vision_tokens=min(self.patches // self.merge, self.tokens),
            tokens=self.tokens,
            token_pairs=int(self.tokens**2 / self.samples / 2),
            supervised=int(self.tokens * SUPERVISED),
        )

    @property
    def padded_work(self) -> StepWork:
        """What a step computes for it, that for padding included."""
        shape = self.shape
        patches = shape.patches * shape.vision_rows
        sizes = {"patches": patches, "vision_tokens": shape.vision_tokens, "tokens": shape.length}
        return dataclasses.replace(self.work, **sizes)

    @property
    def segments(self) -> tuple[np.ndarray, np.ndarray]:
        """The frame of each patch and the sample of each token, int32; 0 = padding."""
        frames = _segments(self.shape.patches * self.shape.vision_rows, self.patches, FRAME_PATCHES)
        return frames, _segments(self.shape.length, self.tokens, self.tokens / self.samples)


def typical_row(data: mixtures.MixtureConfig) -> TypicalRow:
    """Returns a row of the usual length of a mixture."""
    settings = mixtures.data_settings(data)
    shape, tokens = settings.row_shape(settings.lengths[0]), TOKEN_FILL * settings.shape.length
    share = min(FULL * shape.length / tokens, 1)
    merge = 1 if data.image_merge == 1 and data.prune_threshold is None else 4
    patches = int(share * PATCH_FILL * shape.patches * shape.vision_rows)
    return TypicalRow(shape, int(share * tokens), patches, share * SAMPLES_PER_ROW, merge)


def _segments(size: int, filled: float, length: float) -> np.ndarray:
    index = np.arange(size)
    return np.where(index < filled, index // math.ceil(length) + 1, 0).astype(np.int32)
