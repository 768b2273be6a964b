"""Loss weights of the tokens of a conversation for training.

The text of the assistant and the end of its turns are supervised, unless a turn is not to be learned; system and user
turns, media and the tokens that open a turn are not. In a conversation with a live stream, the decision to speak or to
keep watching is supervised too.
"""

from collections.abc import Sequence

import numpy as np

from vl3_jax.processing import chat_template
from vl3_jax.processing.tokenizer import IM_END, STREAM_END, Tokenizer


def token_loss_weights(
    turns: Sequence[chat_template.RenderedTurn],
    tokenizer: Tokenizer,
    rng: np.random.Generator | None = None,
    trainer_streams: bool = False,
) -> list[np.ndarray]:
    """Computes the loss weight of predicting each token, message by message.

    Args:
      turns: Rendered messages; their style must have the same `trainer_streams`.
      tokenizer: Tokenizer that the messages were rendered with.
      rng: Generator that selects the decisions dropped by balancing; a generator with seed 0 if None.
      trainer_streams: Supervise the stream tokens that the official trainer supervises (the token after each image
        and the end of the message) instead of the decision to speak, which the released processor supervises.

    Returns:
      [n] float32 of 0 and 1 for each message.
    """
    weights = [np.zeros(turn.tokens.shape, np.float32) for turn in turns]
    prompt_length = len(chat_template.generation_prompt(tokenizer))
    for turn, weight in zip(turns, weights, strict=True):
        if turn.role == "assistant" and turn.learned:
            end = _last_index(turn.tokens, tokenizer.id_of(IM_END))
            weight[prompt_length : end + 1] = 1
        elif turn.role == "stream" and trainer_streams:
            after_image = np.flatnonzero(turn.is_vision[:-1] & ~turn.is_vision[1:]) + 1
            weight[after_image] = 1
            weight[_last_index(turn.tokens, tokenizer.id_of(STREAM_END))] = 1
        weight[turn.is_vision] = 0
    if not trainer_streams:
        for index in _speaking_decisions(turns, rng or np.random.default_rng(0)):
            weights[index][0] = 1
    return weights


def _speaking_decisions(turns: Sequence[chat_template.RenderedTurn], rng: np.random.Generator) -> list[int]:
    """Selects the messages whose first token is supervised: equally many of each kind that follow a stream message.

    The kinds are "speak" (a message) and "keep watching" (another stream message). With only one kind in the
    conversation, all of its messages are selected.
    """
    is_stream = [turn.role == "stream" for turn in turns]
    taught = [turn.learned or turn.role != "assistant" for turn in turns]
    decisions = [index for index in range(1, len(turns)) if is_stream[index - 1] and taught[index]]
    kinds = [[index for index in decisions if is_stream[index] == watching] for watching in (False, True)]
    fewest = min((len(kind) for kind in kinds if kind), default=0)
    return sorted(int(index) for kind in kinds if kind for index in rng.permutation(kind)[:fewest])


def _last_index(tokens: np.ndarray, token_id: int) -> int:
    return int(np.flatnonzero(tokens == token_id)[-1])
