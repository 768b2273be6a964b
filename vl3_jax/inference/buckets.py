"""The short list of padded sizes that inference compiles for."""

import itertools
from collections.abc import Iterator

SMALLEST = 64


def bucket_sizes() -> Iterator[int]:
    """64, 96, 128, 192, 256, 384, ...: at most a third of a bucket is padding."""
    for power in itertools.count():
        yield SMALLEST * 2**power
        yield SMALLEST * 3 * 2**power // 2


def round_up_to_bucket(size: int) -> int:
    """The smallest rung that holds `size`."""
    return next(rung for rung in bucket_sizes() if rung >= size)


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`: how many rows a batch is padded to."""
    return 1 << max(size - 1, 0).bit_length()
