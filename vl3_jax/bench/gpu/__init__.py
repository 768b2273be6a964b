"""`vl3 bench gpu`: one script for a GPU that is there for a few minutes only.

Its parts run in order of worth, each in a process of its own, and each measurement is saved as soon as it is made. No
module of this package imports jax before a part runs, and none imports packages that read videos or configurations.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Part(NamedTuple):
    """A part of the script.

    Attributes:
      title: What it measures, one line.
      cases: The function that lists its cases, "module:name"; it takes `Conditions` and gives `Case`s.
      share: Largest share of all minutes that the part may take, 0 to 1.
      environment: Variables of its process, where they are not set already.
    """

    title: str
    cases: str
    share: float
    environment: Mapping[str, str] = {}


# Allocated at once and nearly whole: a step that fits must not fail because memory is in pieces.
_WHOLE_MEMORY = {"XLA_CLIENT_MEM_FRACTION": "0.95"}
_SHARED_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # with torch

PARTS = {
    "peaks": Part("a product of matrices of random numbers, and a copy", "vl3_jax.bench.gpu.peaks_part:cases", 0.1),
    "step": Part(
        "a training step of the 2B with everything trainable, one row as full as those of stage 4; weights and second "
        "moments in float32, first moments and activations in bfloat16",
        "vl3_jax.bench.gpu.step_part:cases",
        0.5,
        _WHOLE_MEMORY,
    ),
    "attention": Part(
        "attention alone in bfloat16, beside cuDNN's and torch's; a backward pass counts as two forward passes",
        "vl3_jax.bench.gpu.attention_part:cases",
        0.3,
        _SHARED_MEMORY,
    ),
    "decode": Part(
        "decoding steps of the 2B in bfloat16, and the weights and used slots of the cache that they read",
        "vl3_jax.bench.gpu.decode_part:cases",
        0.3,
        _WHOLE_MEMORY,
    ),
}
