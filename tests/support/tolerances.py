"""The tolerances of all tests, in one place. They are policy: a failing test is a bug, not a number to raise."""

import numpy as np

# float32 against the reference implementation, per stage (see `relative_error`).
PARITY = 1e-4
# The same for logits over the whole way, from files to logits.
END_TO_END = 1e-3
# A deliberate mistake must show at least this much.
MUTANT = 10 * PARITY
# float32 attention in blocks against dense float32, absolute, on inputs of unit variance.
ATTENTION = 2e-5
# The same mathematics in another order or on other devices, float32, relative.
REORDERED = 1e-5
# Likewise for gradients, which sum over every token.
GRADIENT = 1e-4
# Where the two best logits of the reference are closer than this, greedy decoding may go either way.
GREEDY_MARGIN = 1e-3


def relative_error(ours, reference) -> float:
    """The largest difference, in units of the reference's root mean square."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.sqrt(np.mean(reference**2)))
