"""Speed of the engine on a model of medium size: requests side by side, long prompts between others, second turns."""

import statistics
import time

import numpy as np
import pytest

import vl3_jax as vl3
from support.checkpoints import write_small_checkpoint
from support.media import write_video
from support.samples import random_sample, random_visual
from support.weights import random_params
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.requests import Request
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.model import VideoLLaMA3, preset
from vl3_jax.model.serving_layout import to_serving

pytestmark = pytest.mark.slow
MODEL = VideoLLaMA3(preset("mid"), serving=True)


@pytest.fixture(scope="module")
def params():
    return to_serving(random_params(MODEL.config), MODEL.config)


def test_sixteen_requests_side_by_side(params):
    """Images of 448 x 448 pixels and 128 new tokens: at least three times the tokens of one after another."""
    rng = np.random.default_rng(0)
    samples = [random_sample(rng, [random_visual(rng, (1, 32, 32), 2)], text=20) for _ in range(16)]
    requests = [Request(sample, SamplingConfig(max_new_tokens=128), streams=False) for sample in samples]
    speeds = {}
    for rows, count in ((1, 3), (16, 16)):
        engine = Engine(MODEL, params, stop_ids=(), rows=rows)
        engine.run([Request(samples[0], SamplingConfig(max_new_tokens=9))])
        generations = [engine.submit(request) for request in requests[:count]]
        for generation in generations:
            generation.result()
        decoding = [generation.timings.decode for generation in generations]
        speeds[rows] = 128 * count / (sum(decoding) if rows == 1 else max(decoding))
    print(f"decoding: {speeds[1]:.0f} tokens/s one after another, {speeds[16]:.0f} side by side")
    assert speeds[16] >= 3 * speeds[1]


def test_the_others_go_on_while_a_long_prompt_is_read(params):
    """While 12,000 tokens are read, the time between the tokens of seven other rows at most doubles."""
    rng = np.random.default_rng(0)
    engine = Engine(MODEL, params, stop_ids=(), rows=8, slots=16_384)
    engine.warm_up(tokens=12_100)
    others = [
        engine.submit(Request(random_sample(rng, [], text=100), SamplingConfig(max_new_tokens=16_000)))
        for _ in range(7)
    ]
    while not all(other.tokens for other in others):
        engine.step()

    def step_seconds() -> float:
        start = time.perf_counter()
        engine.step()
        return time.perf_counter() - start

    before = statistics.median(step_seconds() for _ in range(20))
    long = engine.submit(Request(random_sample(rng, [], text=12_000), SamplingConfig(max_new_tokens=1)))
    beside = []
    while not long.tokens:
        beside.append(step_seconds())
    after = statistics.median(step_seconds() for _ in range(20))  # the other rows have grown meanwhile
    first, last = statistics.median(beside[:20]), statistics.median(beside[-20:])
    print(f"a call: {before:.3f} s alone, {first:.3f} s beside; at the end {after:.3f} s and {last:.3f} s")
    print(f"{len(beside)} calls and {sum(beside):.0f} s until the first token of the long prompt")
    assert first <= 2 * before
    assert last <= 2 * after


def test_the_second_turn_about_a_video(tmp_path):
    """Processing and prefill of a second question about a video of a minute cost at most a tenth of the first."""
    model = vl3.load(write_small_checkpoint(tmp_path / "small"))
    write_video(tmp_path / "clip.mp4", range(0, 60_000, 100), height=240, width=320)
    turn = [{"role": "user", "content": [{"type": "video", "video": tmp_path / "clip.mp4"}, "What happens?"]}]
    first = model.answer(turn, max_new_tokens=8)
    turn += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And then?"}]
    second = model.answer(turn, max_new_tokens=8)
    costs = [answer.seconds["process"] + answer.seconds["prefill"] for answer in (first, second)]
    print(f"processing and prefill: {costs[0]:.2f} s, then {costs[1]:.3f} s")
    assert costs[1] <= 0.1 * costs[0]
