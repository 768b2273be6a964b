"""Tests greedy generation by the engine against the reference's generation."""

import numpy as np
import pytest

from support.samples import random_sample, random_visual
from support.tolerances import GREEDY_MARGIN
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.requests import Request
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.model import VideoLLaMA3, preset

pytest.importorskip("support.reference", reason="the reference is not installed: pip install -e '.[parity]'")
from support.reference import model_inputs, native_params, reference_model, tensors, torch


@pytest.mark.parametrize("penalty", [1.0, 1.1])
def test_greedy_text_equals_the_reference(penalty):
    """Compares 64 tokens after an image and a pruned video, up to the first position without a clear best token."""
    config = preset("mid")
    reference = reference_model(config, seed=1)
    params = native_params(tensors(reference), config)
    rng = np.random.default_rng(14)
    visuals = [random_visual(rng, (1, 4, 6), 1), random_visual(rng, (3, 4, 4), 2, still=0.5)]
    sample = random_sample(rng, visuals)
    engine = Engine(VideoLLaMA3(config), params, stop_ids=())
    (answer,) = engine.run([Request(sample, SamplingConfig(64, repetition_penalty=penalty))])
    ours = answer.tokens

    inputs = model_inputs([sample])
    prompt = inputs["input_ids"].shape[1]
    out = reference.generate(
        **inputs,
        max_new_tokens=64,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=[_penalise_generated(prompt, penalty)],
    )
    expected = out.sequences[0, prompt:].tolist()
    scores = [_penalise_generated(prompt, penalty)(out.sequences[:, : prompt + i], s) for i, s in enumerate(out.logits)]
    margins = [float(-np.diff(torch.topk(score[0], 2).values.numpy())[0]) for score in scores]
    decided = next((i for i, margin in enumerate(margins) if margin < GREEDY_MARGIN), 64)
    print(f"greedy, penalty {penalty}: {decided} of 64 positions decided, {len(set(expected))} distinct ids")
    assert len(set(expected)) >= 20
    assert decided == 64
    assert ours[:decided] == expected[:decided]


def _penalise_generated(prompt: int, penalty: float):
    """Builds the reference's repetition penalty, applied to generated tokens only."""

    def process(ids, scores):
        generated = ids[:, prompt:]
        score = torch.gather(scores, 1, generated)
        return scores.scatter(1, generated, torch.where(score < 0, score * penalty, score / penalty))

    return process
