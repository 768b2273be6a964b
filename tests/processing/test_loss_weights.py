"""Tests of loss weights: the spans of the assistant, and the decision to speak in a live stream."""

import dataclasses

import numpy as np
import pytest

from support.media import TOKENIZER
from vl3_jax.processing.chat_template import PromptStyle, VisualTokenCounts, render
from vl3_jax.processing.loss_weights import token_loss_weights
from vl3_jax.processing.messages import parse_messages
from vl3_jax.processing.tokenizer import Tokenizer

IMAGE = {"type": "image", "image": "a.png"}
FRAME = {"role": "stream", "content": [{**IMAGE, "time": 1.0}]}
ANSWER = {"role": "assistant", "content": "He sits."}
REQUEST = {"role": "user", "content": "Watch."}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(TOKENIZER)


def render_with_weights(tokenizer, messages, seed=0, trainer_streams=False, frame_tokens=2):
    turns = parse_messages(messages)
    token_counts = [VisualTokenCounts([frame_tokens])] * sum(len(turn.media) for turn in turns)
    rendered = render(turns, token_counts, tokenizer, PromptStyle(trainer_streams=trainer_streams))
    weights = token_loss_weights(rendered, tokenizer, np.random.default_rng(seed), trainer_streams)
    return rendered, weights


def supervised_tokens(rendered, weights):
    return [turn.tokens[weight > 0].tolist() for turn, weight in zip(rendered, weights, strict=True)]


def test_only_the_assistant_is_supervised_up_to_the_end_of_its_turn(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, "Q1"]},
        {"role": "assistant", "content": "A one."},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "\n\nA two, <|im_end|> typed."},
    ]
    rendered, weights = render_with_weights(tokenizer, messages)
    spans = supervised_tokens(rendered, weights)
    assert spans[:4] == [[], [], [*tokenizer.encode("A one."), 151645], []]
    assert spans[4] == rendered[4].tokens[3:-1].tolist()
    assert [weight.dtype for weight in weights] == [np.float32] * 5


def test_an_image_in_an_assistant_message_is_not_supervised(tokenizer):
    rendered, weights = render_with_weights(tokenizer, [{"role": "assistant", "content": [IMAGE, "Here."]}])
    assert supervised_tokens(rendered, weights) == [[198, *tokenizer.encode("Here."), 151645]]


def test_speaking_and_watching_are_balanced(tokenizer):
    """Of two decisions to speak and one to keep watching, either of the former is dropped, depending on the seed."""
    dropped = set()
    for seed in range(20):
        rendered, weights = render_with_weights(tokenizer, [REQUEST, FRAME, FRAME, ANSWER, FRAME, ANSWER], seed)
        first_weights = [int(weight[0]) for weight in weights]
        assert rendered[2].tokens[0] == 151666
        assert rendered[3].tokens[0] == 151644
        assert (first_weights[:3], first_weights[4]) == ([0, 0, 1], 0)
        assert first_weights[3] + first_weights[5] == 1
        dropped.add(3 if first_weights[5] else 5)
        assert [weight[1:].sum() for weight in weights[:3]] == [0, 0, 0]  # nothing else of a stream message
    assert dropped == {3, 5}


def test_balancing_is_deterministic(tokenizer):
    conversation = [FRAME, FRAME, FRAME, FRAME, ANSWER]
    first, second = (np.concatenate(render_with_weights(tokenizer, conversation, 7)[1]) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_with_one_kind_nothing_is_dropped(tokenizer):
    _, weights = render_with_weights(tokenizer, [FRAME, FRAME, FRAME])
    assert [weight[0] for weight in weights] == [0, 1, 1]


def test_trainer_streams(tokenizer):
    rendered, weights = render_with_weights(tokenizer, [REQUEST, FRAME, ANSWER, FRAME], trainer_streams=True)
    spans = supervised_tokens(rendered, weights)
    assert spans == [[], [198, 151667], [*tokenizer.encode("He sits."), 151645], [198, 151667]]


def test_a_turn_that_is_not_to_be_learned(tokenizer):
    """Neither its text nor, in a stream, the decision to say it; what the model chose not to say is still learned."""
    turns = parse_messages([FRAME, FRAME, ANSWER, REQUEST, ANSWER])
    turns[2] = dataclasses.replace(turns[2], learned=False)
    rendered = render(turns, [VisualTokenCounts([2])] * 2, tokenizer, PromptStyle())
    weights = token_loss_weights(rendered, tokenizer)
    assert [weight.sum() > 0 for weight in weights] == [False, True, False, False, True]
