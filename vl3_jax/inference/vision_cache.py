"""Vision features by content: the tower runs once for each image and each frame, whatever is asked about it."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from vl3_jax.processing.packed_batch import MAX_MERGE, BatchShape, Sample, Visual, pack

CACHE_BYTES = 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """An image or one frame of a video.

    Attributes:
      visual: The frame without pruning.
      digest: Of its pixels and their layout.
      keep: [n] bool, the tokens that are left after pruning.
    """

    visual: Visual
    digest: bytes
    keep: np.ndarray

    @property
    def identities(self) -> np.ndarray:
        """[kept tokens] int64, negative numbers that stand for the tokens of this frame and of no other one."""
        first = int.from_bytes(self.digest[:8], "little") >> 2
        return -1 - ((first + np.flatnonzero(self.keep)) & (2**62 - 1))


def frames_of(sample: Sample) -> Iterator[Frame]:
    """Yields the images and frames of a sample in order."""
    for visual in sample.visuals:
        size, tokens, (count, *grid) = visual.patches_per_frame, visual.tokens_per_frame, visual.grid
        for index in range(count):
            patches = visual.patches[index * size : (index + 1) * size]
            digest = hashlib.blake2b(np.ascontiguousarray(patches).data, digest_size=16)
            digest.update(repr((grid, visual.merge)).encode())
            keep = visual.keep[index * tokens : (index + 1) * tokens]
            yield Frame(Visual(patches, (1, grid[0], grid[1]), visual.merge), digest.digest(), keep)


def token_identities(sample: Sample, frames: Sequence[Frame]) -> np.ndarray:
    """Returns [n] int64: the ids of text, and numbers below 0 for what vision tokens show.

    Two prompts that begin with the same numbers have the same keys and values there.
    """
    identities = sample.tokens.astype(np.int64)
    if frames:
        identities[sample.is_vision] = np.concatenate([frame.identities for frame in frames])[sample.vision_order]
    return identities


def frame_batches(frames: Sequence[Frame], most_patches: int) -> Iterator[list[Frame]]:
    """Yields frames in groups that the tower takes at once: of one size, and at most so many patches unless it is one.

    The groups of a video are of about the same size, so that one compiled program serves all of them.
    """
    start = 0
    while start < len(frames):
        first = frames[start].visual
        same = [frame.visual.grid == first.grid and frame.visual.merge == first.merge for frame in frames[start:]]
        run = same.index(False) if False in same else len(same)
        calls = -(-run // max(most_patches // first.patches_per_frame, 1))
        size = -(-run // calls)
        for begin in range(start, start + run, size):
            yield list(frames[begin : min(begin + size, start + run)])
        start += run


def pack_frames(frames: Sequence[Frame], patches: int) -> dict[str, np.ndarray]:
    """Packs frames of one size into the arrays of `encode_vision`, one row of `patches` patches."""
    tokens = patches // frames[0].visual.merge ** 2
    is_vision = np.ones(sum(frame.visual.num_tokens for frame in frames), bool)
    sample = Sample(np.zeros(len(is_vision), np.int32), is_vision, [frame.visual for frame in frames])
    return pack([[sample]], BatchShape(max(len(is_vision), 1), patches, tokens, samples=1))


def batch_shapes(patches: int, merge: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Returns shape and type of the arrays of `pack_frames`."""
    vision = (1, 1, patches)
    return {
        "patches": ((*vision, 588), np.uint8),
        "patch_segment": (vision, np.int32),
        "patch_hw": ((*vision, 2), np.int32),
        "token_patches": ((1, patches // merge**2, MAX_MERGE**2), np.int32),
    }


class FeatureCache:
    """Features of frames by digest, the most recently used ones, in memory of the host.

    Args:
      most_bytes: Bytes that are kept at most.
    """

    def __init__(self, most_bytes: int = CACHE_BYTES):
        self._most_bytes = most_bytes
        self._entries: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self.bytes = 0

    def get(self, digest: bytes) -> np.ndarray | None:
        """Returns the features [tokens of the frame, D], or None if they are not there."""
        if digest in self._entries:
            self._entries.move_to_end(digest)
        return self._entries.get(digest)

    def put(self, digest: bytes, features: np.ndarray) -> None:
        """Keeps the features of a frame, in place of those that were not used for longest."""
        if digest in self._entries:
            return
        self._entries[digest] = features
        self.bytes += features.nbytes
        while self.bytes > self._most_bytes and self._entries:
            self.bytes -= self._entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Drops everything."""
        self._entries.clear()
        self.bytes = 0
