"""What the engine asks of one call of the decoder.

Rows without a constraint generate several tokens in a call. What a constraint allows is known one token at a time:
the host masks the first one of a call, the row runs ahead freely, and the host takes back what the constraint refuses.
Greedy, or with a temperature alone, a token that is likeliest of all is likeliest of those allowed, so what is kept is
what masking each token would give. A row runs twice as far ahead after a call of which all was kept.

An answer that ends with a watched token takes one more step, which reads that token; what it generates is dropped.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vl3_jax.errors import RunError
from vl3_jax.inference.programs import STEPS_PER_CALL, DecodeRows
from vl3_jax.inference.requests import LENGTH, STOP, Generation
from vl3_jax.inference.rows import CacheRow
from vl3_jax.inference.sampling import SamplingParams
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.inference.token_masks import free_masks

_IDLE = SamplingConfig()
_MOST_AHEAD = STEPS_PER_CALL


class DecodeCall(NamedTuple):
    """A call of the decoder.

    Attributes:
      decoding: The rows that take part, with their requests.
      rows: What each of all rows gives to the program.
      steps: Tokens that each row generates at most.
      logprobs: Most likely tokens that are returned with each.
      all_greedy: Whether no row has a temperature.
    """

    decoding: list[tuple[CacheRow, Generation]]
    rows: DecodeRows
    steps: int
    logprobs: int
    all_greedy: bool


def next_call(rows: Sequence[CacheRow], vocab_size: int) -> DecodeCall | None:
    """Returns the call for the rows whose prompts are read; None if there are none.

    A request whose constraint has failed ends with its error and takes no part.
    """
    token, remaining = np.zeros((2, len(rows)), np.int32)
    active, fresh = np.zeros((2, len(rows)), bool)
    allowed = free_masks(len(rows), vocab_size)
    taken_back = np.full((len(rows), STEPS_PER_CALL - 1), vocab_size, np.int32)
    settings = [_IDLE] * len(rows)
    decoding: list[tuple[CacheRow, Generation]] = []
    masked = []
    for row in rows:
        generation, index = row.generation, row.index
        if generation is None or generation.done or not row.decodes:
            continue
        request, written = generation.request, generation.tokens
        remaining[index] = 1 if generation.ending else request.sampling.max_new_tokens - len(written)
        if request.constraint is not None and not generation.ending:
            try:
                request.constraint.write_mask(allowed[index])
            except RunError as error:
                generation.error = error
                continue
            remaining[index] = min(remaining[index], row.ahead)
            taken_back[index, : len(row.taken_back)] = row.taken_back
            masked.append(index)
        token[index] = written[-1] if written else request.sample.tokens[-1]
        active[index], fresh[index], settings[index] = True, row.fresh, request.sampling
        decoding.append((row, generation))
    if not decoding:
        return None
    # Who reads along sees the first token at once, and a constrained row does not wait for the others.
    begins = any(row.fresh and generation.request.streams for row, generation in decoding)
    steps = 1 if begins else min(STEPS_PER_CALL, int(remaining[masked or active].max()))
    length = np.array([len(row.held) for row in rows], np.int32)
    adapter = np.array([row.adapter for row in rows], np.int32)
    sampling = SamplingParams.of(settings)
    return DecodeCall(
        decoding,
        DecodeRows(length, token, active, fresh, remaining, adapter, sampling, allowed, taken_back),
        steps,
        max(setting.logprobs for setting in settings),
        all(setting.temperature == 0 for setting in settings),
    )


def keep_allowed(row: CacheRow, generation: Generation, new: Sequence[int]) -> tuple[int, str | None]:
    """Lets the constraint of a row see its new tokens, and decides how far the row runs ahead in the next call.

    Returns:
      How many of the tokens are kept, all of them without a constraint or behind its end; and what ends the answer
      behind them, or None.
    """
    constraint, sampling = generation.request.constraint, generation.request.sampling
    if constraint is None or generation.ending:
        return len(new), None
    kept = constraint.accept(new)
    known = {*generation.tokens, *new[:kept]}
    row.taken_back = tuple(token for token in new[kept:] if token not in known)
    # What top-k and top-p keep of all tokens is not what they keep of those that are allowed.
    foreseeable = sampling.temperature == 0 or (sampling.top_k == 0 and sampling.top_p == 1)
    if not foreseeable:
        row.ahead = 1
    else:
        row.ahead = max(kept, 1) if kept < len(new) else min(2 * kept, _MOST_AHEAD)
    end = (LENGTH if constraint.is_led else STOP) if constraint.is_complete else None
    return kept, end
