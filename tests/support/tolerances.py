"""The tolerances of all tests. They are policy: a failing test is a bug, not a reason to raise a tolerance."""

import numpy as np

# float32 against the reference implementation, per stage (see `relative_error`).
PARITY = 1e-4
# The same for logits over the whole pipeline, from files to logits.
END_TO_END = 1e-3
# A deliberate mistake must cause at least this error.
MUTANT = 10 * PARITY
# Blockwise attention in float32 against dense float32, absolute, on inputs of unit variance.
ATTENTION = 2e-5
# Blockwise attention in bfloat16 against dense float32 of the same numbers.
ATTENTION_BFLOAT16 = 2e-2
# An int8 cache against what was written, relative to the largest value: half a step of 127.
INT8_CACHE = 4e-3
# Logits over an int8 cache against those over a float32 one, in norm.
INT8_CACHE_LOGITS = 3e-2
# The same computation in another order or on other devices, float32, relative.
REORDERED = 1e-5
# The same for gradients, which sum over all tokens.
GRADIENT = 1e-4
# Adam steps after a resume on another mesh against the same steps on the same mesh, relative to the change: where a
# gradient nearly vanishes, rounding decides the sign of a step.
RESUMED_ON_ANOTHER_MESH = 5e-3
# The change of a parameter over ten AdamW steps against the reference's optimizer, in norm: a gradient that is only
# rounding error is normalised by AdamW and becomes as large as any other.
UPDATE = 5e-3
# bfloat16 first moments against float32: the change of all parameters over a few steps, in norm.
BFLOAT16_MOMENT = 1e-2
# Where the two largest logits of the reference are closer than this, greedy decoding may choose either.
GREEDY_MARGIN = 1e-3


def relative_error(ours, reference) -> float:
    """Returns the largest absolute difference relative to the root mean square of the reference."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.sqrt(np.mean(reference**2)))


def relative_norm(ours, reference) -> float:
    """Returns the norm of the difference relative to the norm of the reference."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.linalg.norm((ours - reference).ravel()) / np.linalg.norm(reference.ravel()))
