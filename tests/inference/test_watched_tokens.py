"""Hidden states of watched tokens: those of a forward pass, also where the answer ends with such a token."""

import functools
from typing import Any, cast

import numpy as np
import pytest

from support.dictated import Dictated
from support.samples import random_sample, random_visual, shape_for
from support.tolerances import REORDERED, relative_error
from support.weights import random_params
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.requests import CANCELLED, LENGTH, STOP, Request
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.model import VideoLLaMA3, decode, encode, preset
from vl3_jax.processing.packed_batch import Sample, pack

MODEL = VideoLLaMA3(preset("tiny"))
PARAMS = random_params(MODEL.config)
GREEDY = SamplingConfig(max_new_tokens=20, repetition_penalty=3.0)
VISION = ("patches", "patch_segment", "patch_hw", "token_patches")
TEXT = ("vision_slot", "segment_ids", "positions")
pytestmark = pytest.mark.usefixtures("fast_compile")


@functools.cache
def samples() -> list[Sample]:
    rng = np.random.default_rng(3)
    return [random_sample(rng, [random_visual(rng, (1, 4, 6), 1)], text=5), random_sample(rng, [], text=9)]


@functools.cache
def answers() -> list[list[int]]:
    engine = Engine(MODEL, PARAMS, stop_ids=(), rows=2)
    return [generation.tokens for generation in engine.run(Request(sample, GREEDY) for sample in samples())]


@functools.cache
def watching(token: int) -> Engine:
    return Engine(MODEL, PARAMS, stop_ids=(), rows=2, watched=token)


def forward(sample: Sample, answer: list[int]) -> np.ndarray:
    """Returns the hidden states of an answer, by one forward pass over prompt and answer."""
    tokens = np.concatenate([sample.tokens, np.asarray(answer, np.int32)])
    whole = Sample(tokens, np.append(sample.is_vision, np.zeros(len(answer), bool)), sample.visuals)
    batch = pack([[whole]], shape_for([[whole]], spare=0))
    features = encode(MODEL, PARAMS, *(batch[name] for name in VISION))
    hidden, _ = decode(MODEL, PARAMS, batch["tokens"], features, *(batch[name] for name in TEXT))
    return np.asarray(hidden)[0, len(sample.tokens) : len(tokens)]


def test_hidden_states_are_those_of_a_forward_pass():
    """The token stands in the middle of one answer, and both rows run side by side with it."""
    token = answers()[0][11]
    generations = watching(token).run(Request(sample, GREEDY) for sample in samples())
    for sample, answer, generation in zip(samples(), answers(), generations, strict=True):
        assert generation.tokens == answer
        assert list(generation.hidden) == [place for place, other in enumerate(answer) if other == token]
        states = forward(sample, answer)
        for place, hidden in generation.hidden.items():
            assert relative_error(hidden, states[place]) <= REORDERED


@pytest.mark.parametrize("place", [0, 7, 8, 11])
def test_an_answer_that_ends_with_it(place):
    """At the limit of tokens, and at a stop string, within a call of the decoder and at the end of one."""
    (sample, _), (answer, _) = samples(), answers()
    engine, states = watching(answer[place]), forward(sample, answer[: place + 1])
    limited = SamplingConfig(max_new_tokens=place + 1, repetition_penalty=3.0)
    seen: list[int] = []

    def ends(token: int) -> bool:
        seen.append(token)
        return len(seen) == place + 1

    for request, reason in ((Request(sample, limited), LENGTH), (Request(sample, GREEDY, ends), STOP)):
        generation = engine.submit(request).result()
        assert (generation.tokens, generation.finish_reason) == (answer[: place + 1], reason)
        assert relative_error(generation.hidden[place], states[-1]) <= REORDERED


def test_a_constraint_may_end_with_it():
    """What the row ran ahead in vain leaves no hidden state, and the row beside it says what it says alone."""
    token, (sample, other) = 33, samples()
    dictated = [token, 9, token, answers()[0][0], token]
    constrained = Request(sample, GREEDY, constraint=cast(Any, Dictated(dictated)))
    generation, free = watching(token).run([constrained, Request(other, GREEDY)])
    assert (generation.tokens, generation.finish_reason, free.tokens) == (dictated, STOP, answers()[1])
    assert sorted(generation.hidden) == [0, 2, 4]
    states = forward(sample, dictated)
    for place, hidden in generation.hidden.items():
        assert relative_error(hidden, states[place]) <= REORDERED


def test_a_conversation_goes_on_behind_it():
    (sample, _), (answer, _) = samples(), answers()
    limited = SamplingConfig(max_new_tokens=8, repetition_penalty=3.0)
    engine = watching(answer[7])
    assert engine.submit(Request(sample, limited)).result().tokens == answer[:8]
    tokens = np.concatenate([sample.tokens, np.asarray(answer[:8], np.int32), [5, 6]])
    longer = Sample(tokens, np.append(sample.is_vision, np.zeros(10, bool)), sample.visuals)
    generation = engine.submit(Request(longer, limited)).result()
    assert generation.reused_tokens == len(tokens) - 2, "what the last step has read is kept, too"
    assert generation.tokens == Engine(MODEL, PARAMS, stop_ids=()).submit(Request(longer, limited)).result().tokens


def test_cancelled_before_its_last_step():
    (sample, _), (answer, _) = samples(), answers()
    generation = watching(answer[7]).submit(Request(sample, SamplingConfig(max_new_tokens=8, repetition_penalty=3.0)))
    while len(generation.tokens) < 8:
        generation.engine.step()
    generation.cancel()
    assert not generation.engine.step(), "its row is free"
    assert generation.finish_reason == CANCELLED
