"""Training targets: which tokens of a conversation are learned.

The assistant's words and the end of its turn are; system and user turns, media and the words that open
a turn never are. In a conversation with a live stream, whether to speak or to keep watching is learned too.
"""

from collections.abc import Sequence

import numpy as np

from vl3_jax.processing import chat_template
from vl3_jax.processing.tokenizer import IM_END, IM_START, STREAM_END, STREAM_START, Tokenizer


def token_loss_weights(
    turns: Sequence[chat_template.RenderedTurn],
    tokenizer: Tokenizer,
    rng: np.random.Generator | None = None,
    trainer_streams: bool = False,
) -> list[np.ndarray]:
    """The loss weight of predicting each token, message by message.

    Args:
      turns: as rendered, with the same `trainer_streams` in their style.
      tokenizer: the one they were rendered with.
      rng: chooses what balancing drops; seed 0 if not given.
      trainer_streams: learn the stream tokens that the official trainer does (the token after each picture
        and the end of the message), instead of the decision to speak as the released processor does.

    Returns:
      [n] float32 of 0 and 1 for each message.
    """
    weights = [np.zeros(turn.tokens.shape, np.float32) for turn in turns]
    opening = len(chat_template.generation_prompt(tokenizer))
    for turn, weight in zip(turns, weights, strict=True):
        if turn.role == "assistant":
            end = _last(turn.tokens, tokenizer.id_of(IM_END))
            weight[opening : end + 1] = 1
        elif turn.role == "stream" and trainer_streams:
            after_picture = np.flatnonzero(turn.is_vision[:-1] & ~turn.is_vision[1:]) + 1
            weight[after_picture] = 1
            weight[_last(turn.tokens, tokenizer.id_of(STREAM_END))] = 1
        weight[turn.is_vision] = 0
    if not trainer_streams:
        for index in _speaking_decisions(turns, tokenizer, rng or np.random.default_rng(0)):
            weights[index][0] = 1
    return weights


def _speaking_decisions(
    turns: Sequence[chat_template.RenderedTurn], tokenizer: Tokenizer, rng: np.random.Generator
) -> list[int]:
    """The messages whose first token is a target: those after a stream message, as many of each kind.

    With only one kind in the conversation all of them stay.
    """
    if not any(turn.role == "stream" for turn in turns):
        return []
    kinds = {tokenizer.id_of(name): [] for name in (IM_START, STREAM_START)}
    for index in range(1, len(turns)):
        if turns[index - 1].role == "stream":
            kinds[int(turns[index].tokens[0])].append(index)
    occurring = [indices for indices in kinds.values() if indices]
    fewest = min(map(len, occurring), default=0)
    return sorted(int(index) for indices in occurring for index in rng.permutation(indices)[:fewest])


def _last(tokens: np.ndarray, token_id: int) -> int:
    return int(np.flatnonzero(tokens == token_id)[-1])
