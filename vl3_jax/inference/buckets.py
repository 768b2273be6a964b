"""The padded sizes that inference compiles for."""

import itertools
from collections.abc import Iterator

SMALLEST_BUCKET = 64


def bucket_sizes() -> Iterator[int]:
    """Yields 64, 96, 128, 192, 256, 384, ...: at most a third of a bucket is padding."""
    for power in itertools.count():
        yield SMALLEST_BUCKET * 2**power
        yield SMALLEST_BUCKET * 3 * 2**power // 2


def round_up_to_bucket(size: int) -> int:
    """Returns the smallest bucket that holds `size`."""
    return next(bucket for bucket in bucket_sizes() if bucket >= size)


def power_of_two(size: int) -> int:
    """Returns the smallest power of two that is at least `size`: the number of rows a batch is padded to."""
    return 1 << max(size - 1, 0).bit_length()
