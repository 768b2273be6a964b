"""Training targets: assistant spans, and when to speak in a live stream."""

import numpy as np
import pytest

from support.media import TOKENIZER
from vl3_jax.processing.chat_template import PromptStyle, VisualTokenCounts, render
from vl3_jax.processing.loss_weights import token_loss_weights
from vl3_jax.processing.messages import parse_messages
from vl3_jax.processing.tokenizer import Tokenizer

IMAGE = {"type": "image", "image": "a.png"}
FRAME = {"role": "stream", "content": [{**IMAGE, "time": 1.0}]}
SPEAK = {"role": "assistant", "content": "He sits."}
ASK = {"role": "user", "content": "Watch."}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(TOKENIZER)


def targets(tokenizer, messages, seed=0, trainer=False, vision=2):
    turns = parse_messages(messages)
    shown = [VisualTokenCounts([vision])] * sum(len(turn.media) for turn in turns)
    rendered = render(turns, shown, tokenizer, PromptStyle(trainer_streams=trainer))
    weights = token_loss_weights(rendered, tokenizer, np.random.default_rng(seed), trainer)
    return rendered, weights


def learned(rendered, weights):
    return [turn.tokens[weight > 0].tolist() for turn, weight in zip(rendered, weights, strict=True)]


def test_only_the_assistant_is_learned_to_the_end_of_its_turn(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, "Q1"]},
        {"role": "assistant", "content": "A one."},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "\n\nA two, <|im_end|> typed."},
    ]
    rendered, weights = targets(tokenizer, messages)
    spans = learned(rendered, weights)
    assert spans[:4] == [[], [], [*tokenizer.encode("A one."), 151645], []]
    assert spans[4] == rendered[4].tokens[3:-1].tolist()
    assert [weight.dtype for weight in weights] == [np.float32] * 5


def test_a_picture_in_an_answer_is_not_learned(tokenizer):
    rendered, weights = targets(tokenizer, [{"role": "assistant", "content": [IMAGE, "Here."]}])
    assert learned(rendered, weights) == [[198, *tokenizer.encode("Here."), 151645]]


def test_speaking_and_watching_are_balanced(tokenizer):
    """Two chances to speak, one to keep watching: one of the former is dropped, now this, now that."""
    dropped = set()
    for seed in range(20):
        rendered, weights = targets(tokenizer, [ASK, FRAME, FRAME, SPEAK, FRAME, SPEAK], seed)
        first = [int(weight[0]) for weight in weights]
        assert rendered[2].tokens[0] == 151666
        assert rendered[3].tokens[0] == 151644
        assert (first[:3], first[4]) == ([0, 0, 1], 0)
        assert first[3] + first[5] == 1
        dropped.add(3 if first[5] else 5)
        assert [weight[1:].sum() for weight in weights[:3]] == [0, 0, 0]  # nothing else of a stream message
    assert dropped == {3, 5}


def test_balancing_is_repeatable(tokenizer):
    conversation = [FRAME, FRAME, FRAME, FRAME, SPEAK]
    one, other = (np.concatenate(targets(tokenizer, conversation, 7)[1]) for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_with_one_kind_nothing_is_dropped(tokenizer):
    _, weights = targets(tokenizer, [FRAME, FRAME, FRAME])
    assert [weight[0] for weight in weights] == [0, 1, 1]


def test_the_trainers_variant(tokenizer):
    rendered, weights = targets(tokenizer, [ASK, FRAME, SPEAK, FRAME], trainer=True)
    spans = learned(rendered, weights)
    assert spans == [[], [198, 151667], [*tokenizer.encode("He sits."), 151645], [198, 151667]]
