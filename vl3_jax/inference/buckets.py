"""The padded sizes that inference compiles for, and the parts in which a prompt is read."""

import itertools
from collections.abc import Callable, Iterator

SMALLEST_BUCKET = 64
SMALLEST_SLOTS = 1024
SMALLEST_PART, LARGEST_PART = 16, 1024  # tokens of a part of a prompt


def bucket_sizes() -> Iterator[int]:
    """Yields 64, 96, 128, 192, 256, 384, ...: at most a third of a bucket is padding."""
    for power in itertools.count():
        yield SMALLEST_BUCKET * 2**power
        yield SMALLEST_BUCKET * 3 * 2**power // 2


def round_up_to_bucket(size: int) -> int:
    """Returns the smallest bucket that holds `size`."""
    return next(bucket for bucket in bucket_sizes() if bucket >= size)


def power_of_two(size: int) -> int:
    """Returns the smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def slots_for(tokens: int, context: int) -> int:
    """Returns the slots of a row of `tokens` tokens: a power of two, so that few later ones need more."""
    return max(min(max(power_of_two(tokens), SMALLEST_SLOTS), context), tokens)


def part_sizes(start: int, limit: Callable[[int], float]) -> list[int]:
    """Returns the sizes that a part of a prompt may have whose first token has position `start`.

    Args:
      start: Position of the first token.
      limit: Returns the most tokens of a part, by the position of its first token.
    """
    sizes, largest = [SMALLEST_PART], min(limit(start), LARGEST_PART)
    while 2 * sizes[-1] <= largest:
        sizes.append(2 * sizes[-1])
    return sizes


def prompt_parts(start: int, end: int, limit: Callable[[int], float], overhead: int) -> Iterator[tuple[int, int]]:
    """Yields position and padded size of the parts in which the tokens from `start` to `end` of a prompt are read.

    They depend on nothing but the prompt, so that other requests do not change how one is computed.

    Args:
      start: Position of the first token.
      end: Position behind the last token.
      limit: Returns the most tokens of a part, by the position of its first token.
      overhead: What reading a part costs besides its tokens, in tokens.
    """
    while start < end:
        sizes = part_sizes(start, limit)
        size = min(sizes, key=lambda size: (-(-(end - start) // size) * (size + overhead), -size))
        yield start, size
        start += size
