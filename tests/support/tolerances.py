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
# The same in bfloat16, against dense float32 of the same numbers.
ATTENTION_BFLOAT16 = 2e-2
# The same mathematics in another order or on other devices, float32, relative.
REORDERED = 1e-5
# Likewise for gradients, which sum over every token.
GRADIENT = 1e-4
# Steps of Adam on another mesh than before, against the same steps on the same mesh, in units of the change: where a
# gradient nearly vanishes, rounding decides the sign of a step.
RESUMED_ON_ANOTHER_MESH = 5e-3
# The change of a parameter over ten AdamW steps against the reference's optimizer, in norm: where a gradient is all
# rounding, AdamW's division by its own size makes it as large as any other.
UPDATE = 5e-3
# bfloat16 storage of the first moment against float32: the change of all parameters over a few steps, in norm.
BFLOAT16_MOMENT = 1e-2
# Where the two best logits of the reference are closer than this, greedy decoding may go either way.
GREEDY_MARGIN = 1e-3


def relative_error(ours, reference) -> float:
    """The largest difference, in units of the reference's root mean square."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.sqrt(np.mean(reference**2)))


def relative_norm(ours, reference) -> float:
    """The norm of the difference over the norm of the reference."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.linalg.norm((ours - reference).ravel()) / np.linalg.norm(reference.ravel()))
