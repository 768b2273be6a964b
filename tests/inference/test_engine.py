"""Tests the engine: its rows side by side, what it keeps, what it compiles, and how requests end."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.forward import TEXT_KEYS, VISION_KEYS
from support.samples import random_sample, random_visual, shape_for
from support.tolerances import REORDERED, relative_error
from support.weights import random_params
from vl3_jax.errors import InputError
from vl3_jax.inference.compiled_programs import CompiledPrograms
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.requests import Request
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.model import KVCache, VideoLLaMA3, abstract_params, decode, encode, param_axes, preset, unembed
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import shardings
from vl3_jax.processing.packed_batch import Sample, pack

MODEL = VideoLLaMA3(preset("tiny"))
PARAMS = random_params(MODEL.config)
CPU = jax.sharding.SingleDeviceSharding(jax.devices()[0])
# The penalty makes the answers of a random model differ from token to token.
GREEDY = SamplingConfig(max_new_tokens=20, repetition_penalty=3.0)
pytestmark = pytest.mark.usefixtures("fast_compile")


@functools.cache
def engine() -> Engine:
    """An engine that is used by several tests, with eight rows."""
    return Engine(MODEL, PARAMS, stop_ids=(), rows=8)


def run(engine: Engine, samples, sampling=GREEDY) -> list[list[int]]:
    return [generation.tokens for generation in engine.run(Request(sample, sampling) for sample in samples)]


def make_samples(seed=5):
    rng = np.random.default_rng(seed)
    return [
        random_sample(rng, [random_visual(rng, (1, 6, 10), 1)], text=5),
        random_sample(rng, [], text=33),
        random_sample(rng, [random_visual(rng, (4, 4, 6), 2, still=0.5)], text=7),
    ]


def test_prefill_and_steps_equal_one_forward_pass():
    """Feeds rows of different lengths through one cache, in chunks of several sizes."""
    samples = make_samples()
    rows = [[sample] for sample in samples]
    batch = pack(rows, shape_for(rows, spare=8))
    features = encode(MODEL, PARAMS, *(batch[key] for key in VISION_KEYS))
    text = [batch[key] for key in TEXT_KEYS]
    whole, _ = decode(MODEL, PARAMS, batch["tokens"], features, *text)
    cache = KVCache.empty(MODEL.config.text, 3, batch["tokens"].shape[1])
    chunks, start = [], 0
    step = jax.jit(functools.partial(decode, MODEL))
    for size in (40, 1, 1, 7, batch["tokens"].shape[1] - 49):
        columns = slice(start, start + size)
        hidden, cache = step(PARAMS, batch["tokens"][:, columns], features, *(x[:, columns] for x in text), cache)
        chunks.append(hidden)
        start += size
    real = batch["segment_ids"] > 0
    np.testing.assert_array_equal(cache.length, real.sum(1))
    assert relative_error(jnp.concatenate(chunks, 1)[real], whole[real]) <= REORDERED


def test_padding_takes_no_cache_slot():
    """Tokens of segment 0 in front, in between and at the end are never written to the cache."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 400, (1, 24)).astype(np.int32)
    real = ~np.isin(np.arange(24), [0, 1, 9, 23])[None]
    positions = np.where(real, np.cumsum(real) - 1, 7).astype(np.int32)
    one, no_vision = np.ones((1, 1), np.int32), np.full((1, 24), -1, np.int32)

    def next_logits(tokens, segment_ids, positions):
        cache = KVCache.empty(MODEL.config.text, 1, 24)
        _, cache = decode(MODEL, PARAMS, tokens, None, no_vision[:, : tokens.shape[1]], segment_ids, positions, cache)
        assert int(cache.length[0]) == 20
        hidden, _ = decode(MODEL, PARAMS, one, None, -one, one, 20 * one, cache)
        return unembed(MODEL, PARAMS, hidden)

    padded = next_logits(tokens, real.astype(np.int32), positions)
    unpadded = next_logits(tokens[real][None], np.ones((1, 20), np.int32), np.arange(20, dtype=np.int32)[None])
    assert relative_error(padded, unpadded) <= REORDERED


def mixed_requests(count: int, temperature: float = 0.0) -> list[Request]:
    """Returns requests of text, an image, several images or a video, with settings of their own."""
    rng = np.random.default_rng(3)
    requests = []
    for number in range(count):
        visuals = [
            [],
            [random_visual(rng, (1, 4, 6), 1)],
            [random_visual(rng, (1, 4, 4), 1), random_visual(rng, (1, 6, 6), 1)],
            [random_visual(rng, (3, 4, 4), 2, still=0.5)],
        ][number % 4]
        sampling = SamplingConfig(
            max_new_tokens=int(rng.integers(1, 24)),
            temperature=temperature * (number % 3),
            top_k=(0, 5, 0, 40)[number % 4],
            top_p=(1.0, 0.9)[number % 2],
            repetition_penalty=float(rng.choice([1.5, 3.0])),
            seed=number,
        )
        requests.append(Request(random_sample(rng, visuals, text=int(rng.integers(3, 40))), sampling))
    return requests


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_requests_that_come_and_go_are_answered_as_if_alone(temperature):
    requests, rng = mixed_requests(64, temperature), np.random.default_rng(0)
    waiting, running = list(rng.permutation(64)), {}
    while waiting or not all(generation.done for generation in running.values()):
        for _ in range(min(int(rng.integers(0, 4)), len(waiting))):
            number = waiting.pop()
            running[number] = engine().submit(requests[number])
        engine().step()
    compiled = engine().compiled_programs
    for number, request in enumerate(requests):
        engine().forget()
        (alone,) = engine().run([request])
        assert (running[number].tokens, running[number].finish_reason) == (alone.tokens, "length")
        assert len(alone.tokens) == request.sampling.max_new_tokens
    assert engine().compiled_programs == compiled
    assert len({tuple(generation.tokens) for generation in running.values()}) > 50


def test_one_row_gives_the_same_answers_as_eight():
    samples = make_samples()
    assert run(Engine(MODEL, PARAMS, stop_ids=()), samples) == run(engine(), samples)


def test_nothing_compiles_after_warm_up():
    compiled = []
    warm = Engine(MODEL, PARAMS, stop_ids=(7,), rows=2)
    warm.warm_up(tokens=200, patches=100, logprobs=3)
    before = warm.compiled_programs

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    requests = [*mixed_requests(8, 0.5), Request(make_samples()[1], SamplingConfig(max_new_tokens=3, logprobs=3))]
    generations = warm.run(requests)
    jax.monitoring.unregister_event_duration_listener(count)
    assert (warm.compiled_programs, compiled) == (before, [])
    assert all(generation.timings.compile == 0 for generation in generations)


def test_tokens_are_written_into_the_cache_in_place():
    model = VideoLLaMA3(MODEL.config, serving=True)
    params = abstract_params(model.config, serving=True)
    text, rows, slots = model.config.text, 4, 4096
    compiled = {}
    on_cpu = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=CPU), params)
    keep = lambda name, lowered: compiled.setdefault(name, lowered.compile())  # noqa: E731
    CompiledPrograms(model, on_cpu, 1, None, compile_lowered=keep).decode(rows, slots, 0, True)
    layer_bytes = 4 * rows * slots * text.cached_values_per_token // text.num_layers
    assert compiled["decode_steps"].memory_analysis().temp_size_in_bytes < layer_bytes / 2


def test_a_follow_up_reads_its_own_words_only():
    fresh, (first, *_) = Engine(MODEL, PARAMS, stop_ids=()), make_samples(7)
    (generation,) = fresh.run([Request(first, GREEDY)])
    assert (generation.reused_tokens, generation.encoded_patches) == (0, 60)
    words = np.random.default_rng(1).integers(1, 400, 9)
    tokens = np.concatenate([first.tokens, generation.tokens, words])
    is_vision = np.concatenate([first.is_vision, np.zeros(len(tokens) - len(first.tokens), bool)])
    second = Sample(tokens, is_vision, first.visuals)
    (follow_up,) = fresh.run([Request(second, GREEDY)])
    # The last token of the first answer was never an input.
    assert follow_up.reused_tokens == len(first.tokens) + len(generation.tokens) - 1
    assert follow_up.encoded_patches == 0
    fresh.forget()
    (anew,) = fresh.run([Request(second, GREEDY)])
    assert (anew.tokens, anew.reused_tokens, anew.encoded_patches) == (follow_up.tokens, 0, 60)


def test_the_tower_runs_once_for_each_medium():
    rng = np.random.default_rng(2)
    video, image = random_visual(rng, (3, 4, 4), 2), random_visual(rng, (1, 4, 6), 1)
    fresh = Engine(MODEL, PARAMS, stop_ids=(), rows=2)
    orders = [[video], [image, video], [video.first_frames(2)], [image]]
    generations = [fresh.run([Request(random_sample(rng, visuals), GREEDY)])[0] for visuals in orders]
    assert [generation.encoded_patches for generation in generations] == [48, 24, 0, 0]


def test_generation_ends_at_a_stop_token_of_each_row():
    samples = make_samples()
    unstopped = run(engine(), samples)
    stop_id = unstopped[0][4]
    stopped = run(Engine(MODEL, PARAMS, stop_ids=(stop_id,), rows=2), samples)
    for expected, tokens in zip(unstopped, stopped, strict=True):
        end = expected.index(stop_id) + 1 if stop_id in expected else len(expected)
        assert tokens == expected[:end]


def test_a_request_ends_behind_the_token_that_finishes_it():
    sample = make_samples()[0]
    (whole,) = run(engine(), [sample])
    ending = Request(sample, GREEDY, is_finished=lambda token: token == whole[4])
    (generation,) = engine().run([ending])
    assert (generation.tokens, generation.finish_reason) == (whole[:5], "stop")
    assert run(engine(), [sample]) == [whole]  # the row holds what was decoded beyond


def test_a_cancelled_request_frees_its_row():
    fresh = Engine(MODEL, PARAMS, stop_ids=())
    left, other = (fresh.submit(Request(sample, GREEDY)) for sample in make_samples()[:2])
    for _ in left:
        break
    assert left.finish_reason == "cancelled"
    assert 0 < len(left.tokens) < 20
    other.result()
    assert other.tokens == run(engine(), make_samples()[1:2])[0]
    waiting = fresh.submit(Request(make_samples()[0], GREEDY))
    waiting.cancel()
    assert not fresh.step()
    assert waiting.result().tokens == []


def test_requests_from_several_threads():
    samples, answers = make_samples(), {}

    def ask(number):
        answers[number] = engine().submit(Request(samples[number], GREEDY)).result().tokens

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number] for number in range(3)] == run(engine(), samples)


def test_a_request_that_is_too_long_is_refused_alone():
    running = engine().submit(Request(make_samples()[1], GREEDY))
    with pytest.raises(InputError, match="context of 32768"):
        engine().submit(Request(make_samples()[0], SamplingConfig(max_new_tokens=32_768)))
    assert running.result().tokens == run(engine(), make_samples()[1:2])[0]


def test_an_interrupt_ends_what_runs_and_nothing_else(monkeypatch):
    fresh = Engine(MODEL, PARAMS, stop_ids=())
    expected = run(fresh, make_samples()[:1])
    stopped = fresh.submit(Request(make_samples()[1], GREEDY))

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fresh, "_decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stopped.result()
    assert run(fresh, make_samples()[:1]) == expected


def test_logprobs_are_those_of_the_model_for_each_row():
    sample = make_samples()[1]
    few, many, none = engine().run(
        Request(sample, SamplingConfig(max_new_tokens=12, logprobs=count)) for count in (3, 8, 0)
    )
    assert none.logprobs is None
    assert [len(step) for step in few.logprobs] == [3] * 12
    assert [step[:3] for step in many.logprobs] == few.logprobs
    assert [step[0][0] for step in few.logprobs] == few.tokens
    values = np.array([[value for _, value in step] for step in many.logprobs])
    assert np.all(np.diff(values, axis=-1) <= 0)
    assert np.all(values <= 0)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}, {"stop": ("",)}]
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(InputError):
        SamplingConfig(**settings)


@pytest.mark.parametrize(
    "axes", [{"fsdp": 4, "tensor": 2}, pytest.param({"data": 2, "tensor": 2}, marks=pytest.mark.slow)]
)
def test_a_sharded_model_gives_the_same_answers_as_one_device(axes):
    mesh = make_mesh(axes, jax.devices()[: np.prod(list(axes.values()))])
    param_shardings = shardings(abstract_params(MODEL.config), param_axes(MODEL.config), mesh)
    sharded = Engine(MODEL, jax.device_put(PARAMS, param_shardings), stop_ids=(), mesh=mesh, rows=4)
    samples = make_samples()
    assert run(sharded, samples) == run(engine(), samples)
    before = sharded.compiled_programs
    sharded.forget()
    assert run(sharded, samples) == run(engine(), samples)
    assert sharded.compiled_programs == before
