"""How much of a prompt the engine reads between two calls of the decoder."""

import contextlib

import jax

from vl3_jax.model.config import TextConfig
from vl3_jax.parallel.rules import target_device

# Tokens of a prompt that take about as long as a call of the decoder, and what a call costs besides its tokens, in
# tokens: a CPU computes few numbers in the time in which it reads one of the weights.
_CPU_TOKENS, _CPU_OVERHEAD = 64, 32
_TOKENS, _OVERHEAD = 1024, 256
_CPU_MOST_TOKENS = 256  # of a part where nobody waits: more are hardly faster, and need more memory
_PATCHES_PER_TOKEN = 4  # patches that the tower takes in the time of a token of the decoder


class Pace:
    """The sizes of the pieces of work that a prompt is.

    Args:
      text: Sizes of the decoder.
      mesh: The mesh of the engine; None on one device.

    Attributes:
      overhead: What reading a part of a prompt costs besides its tokens, in tokens.
    """

    def __init__(self, text: TextConfig, mesh: jax.sharding.Mesh | None):
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            on_cpu = target_device().platform == "cpu"
        self._step_tokens, self.overhead = (_CPU_TOKENS, _CPU_OVERHEAD) if on_cpu else (_TOKENS, _OVERHEAD)
        self._most_tokens = _CPU_MOST_TOKENS if on_cpu else _TOKENS
        # Arithmetic of attention to one token, relative to that of the weights for one token.
        per_layer = text.hidden_size * (2 * text.num_heads + 2 * text.num_kv_heads) * text.head_dim
        per_layer += 3 * text.hidden_size * text.intermediate_size
        self._attention_share = 2 * text.num_heads * text.head_dim / per_layer

    def part_limit(self, awaited: bool, start: int) -> float:
        """Returns the most tokens, behind `start` others, of a part of a prompt.

        Where others are `awaited` meanwhile, a part takes about as long as a call of the decoder.
        """
        return self._step_tokens / (1 + self._attention_share * start) if awaited else self._most_tokens

    def most_patches(self, awaited: bool) -> int:
        """Returns the most patches that the tower takes at once, where others are `awaited` meanwhile or not."""
        return _PATCHES_PER_TOKEN * (self._step_tokens if awaited else _TOKENS)
