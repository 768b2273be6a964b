"""The packed batch: samples of text, images and videos packed into arrays of static shape.

The model's `encode` and `decode` take exactly these arrays, in training and in inference. Dimension names: B text rows
of L tokens with at most S samples each; R vision rows of N patches for each text row; T vision tokens. The values are
documented in docs/architecture.md, "The packed batch".
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

PATCH_DIM = 588  # 3 channels x 14 rows x 14 columns
_FILLED: Any = None  # default of an array that `__post_init__` fills
MAX_MERGE = 2  # the widest spatial merge; in the reference a wider one is not the mean of its block


class CapacityError(ValueError):
    """A row of samples exceeds the capacities of the batch shape."""


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Capacities of one text row.

    Attributes:
      length: Number of tokens (L).
      patches: Number of patches in each vision row (N).
      vision_tokens: Number of vision tokens (T).
      vision_rows: Number of vision rows (R).
      samples: Maximum number of samples (S).
    """

    length: int
    patches: int
    vision_tokens: int
    vision_rows: int = 1
    samples: int = 64


@dataclasses.dataclass
class Visual:
    """One image or video, resized and cut into patches.

    Attributes:
      patches: [t * gh * gw, 588] uint8, frame by frame, merge block by merge block; the values of a patch are ordered
        channel, row, column.
      grid: (t, gh, gw): number of frames, and patch rows and patch columns of each frame.
      merge: Spatial merge size, 1 or 2; merge x merge patches become one vision token.
      keep: [t * gh * gw / merge^2] bool, the tokens that survive pruning; created with None, all of them.
    """

    patches: np.ndarray
    grid: tuple[int, int, int]
    merge: int = 1
    keep: np.ndarray = _FILLED

    def __post_init__(self):
        merge, (frames, height, width) = self.merge, self.grid
        if merge not in (1, MAX_MERGE):
            raise ValueError(f"merge size {merge} is not supported: use 1 or {MAX_MERGE}")
        if height % merge or width % merge:
            raise ValueError(f"a grid of {height} x {width} patches does not divide by merge size {merge}")
        if self.patches.shape != (frames * height * width, PATCH_DIM):
            raise ValueError(f"grid {self.grid} asks for {frames * height * width} patches, got {self.patches.shape}")
        self.keep = np.ones(frames * self.tokens_per_frame, bool) if self.keep is None else self.keep
        if self.keep.shape != (frames * self.tokens_per_frame,):
            raise ValueError(f"grid {self.grid} has {frames * self.tokens_per_frame} tokens, keep {self.keep.shape}")

    @property
    def patches_per_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def tokens_per_frame(self) -> int:
        """Number of vision tokens of one frame before pruning."""
        return self.patches_per_frame // self.merge**2

    @property
    def num_tokens(self) -> int:
        """Number of vision tokens left after pruning."""
        return int(self.keep.sum())

    def first_frames(self, count: int) -> "Visual":
        """Returns the first `count` frames of a video with their pruning mask."""
        return Visual(
            self.patches[: count * self.patches_per_frame],
            (count, *self.grid[1:]),
            self.merge,
            self.keep[: count * self.tokens_per_frame],
        )


@dataclasses.dataclass
class Sample:
    """One sample: token ids in which each surviving vision token has a placeholder position.

    Attributes:
      tokens: [n] int32 token ids; the ids at placeholder positions do not matter.
      is_vision: [n] bool; the placeholders, one for each token that the visuals keep, in the same order, and then one
        for each that is repeated; created with None, none.
      visuals: Images and videos in order of appearance.
      loss_weight: [n] float32; loss weight of predicting tokens[i] (0: not supervised); created with None, 0.
      task: Task id of the sample, for a loss per task.
      repeated: [m] int32; the vision tokens, counted over all that the visuals keep, that stand in the prompt once
        more, behind them; created with None, none.
    """

    tokens: np.ndarray
    is_vision: np.ndarray = _FILLED
    visuals: Sequence[Visual] = ()
    loss_weight: np.ndarray = _FILLED
    task: int = 0
    repeated: np.ndarray = _FILLED

    def __post_init__(self):
        self.repeated = np.zeros(0, np.int32) if self.repeated is None else np.asarray(self.repeated, np.int32)
        self.tokens = np.asarray(self.tokens, np.int32)
        self.is_vision = np.zeros(self.tokens.shape, bool) if self.is_vision is None else self.is_vision
        self.loss_weight = np.zeros(self.tokens.shape, np.float32) if self.loss_weight is None else self.loss_weight
        for name in ("is_vision", "loss_weight"):
            if getattr(self, name).shape != self.tokens.shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, tokens {self.tokens.shape}")
        expected = self.num_vision_tokens + len(self.repeated)
        if self.is_vision.sum() != expected:
            raise ValueError(f"{int(self.is_vision.sum())} placeholders for {expected} vision tokens in one sample")

    @property
    def num_vision_tokens(self) -> int:
        return sum(visual.num_tokens for visual in self.visuals)

    @property
    def vision_order(self) -> np.ndarray:
        """[placeholders] int32, the vision token that each placeholder stands for."""
        return np.concatenate([np.arange(self.num_vision_tokens, dtype=np.int32), self.repeated])


def block_coordinates(height: int, width: int, merge: int) -> np.ndarray:
    """Returns the row and column of each patch of a frame in merge-block order: [height * width, 2] int32."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    coordinates = np.stack([rows, columns], axis=-1)
    blocks = coordinates.reshape(height // merge, merge, width // merge, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2).astype(np.int32)


def pack(rows: Sequence[Sequence[Sample]], shape: BatchShape) -> dict[str, np.ndarray]:
    """Packs samples into one batch.

    Args:
      rows: The samples of each of the B text rows.
      shape: Capacities of a text row, which each row must fit.

    Returns:
      The arrays of the packed batch, by name.

    Raises:
      CapacityError: A row holds too many tokens, vision tokens, samples or patches; the error says which.
    """
    batch = _empty_batch(len(rows), shape)
    for index, samples in enumerate(rows):
        row = {name: array[index] for name, array in batch.items()}
        _fill_text(row, samples, shape)
        _fill_vision(row, [visual for sample in samples for visual in sample.visuals], shape)
    return batch


def _empty_batch(rows: int, shape: BatchShape) -> dict[str, np.ndarray]:
    text, vision = (rows, shape.length), (rows, shape.vision_rows, shape.patches)
    return {
        "tokens": np.zeros(text, np.int32),
        "targets": np.zeros(text, np.int32),
        "loss_weight": np.zeros(text, np.float32),
        "segment_ids": np.zeros(text, np.int32),
        "positions": np.zeros(text, np.int32),
        "vision_slot": np.full(text, -1, np.int32),
        "sample_task": np.zeros((rows, shape.samples), np.int32),
        "patches": np.zeros((*vision, PATCH_DIM), np.uint8),
        "patch_segment": np.zeros(vision, np.int32),
        "patch_hw": np.zeros((*vision, 2), np.int32),
        "token_patches": np.full((rows, shape.vision_tokens, MAX_MERGE**2), -1, np.int32),
    }


def _fill_text(row: dict[str, np.ndarray], samples: Sequence[Sample], shape: BatchShape) -> None:
    used = sum(len(sample.tokens) for sample in samples)
    if used > shape.length:
        raise CapacityError(f"{used} tokens do not fit a row of {shape.length}")
    if len(samples) > shape.samples:
        raise CapacityError(f"{len(samples)} samples do not fit a row of {shape.samples}")
    start = slot = 0
    for segment, sample in enumerate(samples, start=1):
        length = len(sample.tokens)
        span, predicting = slice(start, start + length), slice(start, start + length - 1)
        row["tokens"][span] = sample.tokens
        row["segment_ids"][span] = segment
        row["positions"][span] = np.arange(length)
        row["targets"][predicting] = sample.tokens[1:]
        row["loss_weight"][predicting] = sample.loss_weight[1:]
        row["vision_slot"][span][sample.is_vision] = slot + sample.vision_order
        row["sample_task"][segment - 1] = sample.task
        start, slot = start + length, slot + sample.num_vision_tokens


def _fill_vision(row: dict[str, np.ndarray], visuals: Sequence[Visual], shape: BatchShape) -> None:
    """Assigns frames first-fit to the vision rows, so that no frame crosses from one row to the next."""
    free = [shape.patches] * shape.vision_rows
    frames_in_row = [0] * shape.vision_rows
    slot = 0
    for visual in visuals:
        size, tokens, width = visual.patches_per_frame, visual.tokens_per_frame, visual.merge**2
        coordinates = block_coordinates(*visual.grid[1:], visual.merge)
        for frame in range(visual.grid[0]):
            vision_row = next((index for index, patches in enumerate(free) if patches >= size), None)
            if vision_row is None:
                raise CapacityError(
                    f"a frame of {size} patches does not fit {shape.vision_rows} vision rows of {shape.patches}"
                )
            start = shape.patches - free[vision_row]
            span = (vision_row, slice(start, start + size))
            free[vision_row] -= size
            frames_in_row[vision_row] += 1
            row["patches"][span] = visual.patches[frame * size : (frame + 1) * size]
            row["patch_segment"][span] = frames_in_row[vision_row]
            row["patch_hw"][span] = coordinates

            kept = np.flatnonzero(visual.keep[frame * tokens : (frame + 1) * tokens])
            if slot + len(kept) > shape.vision_tokens:
                raise CapacityError(f"more than {shape.vision_tokens} vision tokens in one row")
            first = vision_row * shape.patches + start + kept[:, None] * width
            row["token_patches"][slot : slot + len(kept), :width] = first + np.arange(width)
            slot += len(kept)
