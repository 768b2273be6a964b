"""Tests the engine against one forward pass, and its batches, buckets, sampling and stopping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.forward import TEXT_KEYS, VISION_KEYS
from support.samples import random_sample, random_visual, shape_for
from support.tolerances import REORDERED, relative_error
from support.weights import random_params
from vl3_jax.errors import InputError
from vl3_jax.inference.engine import Engine, Timings
from vl3_jax.inference.sampling import SamplingParams, sample_token
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.model import KVCache, VideoLLaMA3, abstract_params, decode, encode, param_axes, preset, unembed
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import shardings
from vl3_jax.processing.packed_batch import pack

MODEL = VideoLLaMA3(preset("tiny"))
PARAMS = random_params(MODEL.config)
pytestmark = pytest.mark.usefixtures("fast_compile")


@functools.cache
def engine() -> Engine:
    return Engine(MODEL, PARAMS, stop_ids=())


def run(engine: Engine, samples, sampling=None, timings=None) -> list[list[int]]:
    outputs = list(engine.generate(samples, sampling or SamplingConfig(max_new_tokens=20), timings))
    tokens, valid = (np.concatenate([getattr(o, name) for o in outputs], axis=1) for name in ("tokens", "valid"))
    return [row[mask].tolist() for row, mask in zip(tokens, valid, strict=True)]


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


def test_a_batch_gives_the_same_answers_as_single_conversations():
    samples = make_samples()
    assert run(engine(), samples) == [run(engine(), [sample])[0] for sample in samples]


def test_a_second_question_of_the_same_size_compiles_no_programs():
    run(engine(), make_samples(7)[:1])
    before, timings = engine().compiled_programs, Timings()
    run(engine(), make_samples(8)[:1], SamplingConfig(max_new_tokens=17, temperature=0.7, top_k=5, seed=3), timings)
    assert engine().compiled_programs == before
    assert timings.compile == 0
    assert timings.decode > 0


def test_generation_ends_at_a_stop_token_of_each_row():
    samples = make_samples()
    unstopped = run(engine(), samples)
    stop_id = unstopped[0][4]
    stopped = run(Engine(MODEL, PARAMS, stop_ids=(stop_id,)), samples)
    for expected, tokens in zip(unstopped, stopped, strict=True):
        end = expected.index(stop_id) + 1 if stop_id in expected else len(expected)
        assert tokens == expected[:end]


def test_a_prompt_beyond_the_context_is_refused():
    with pytest.raises(InputError, match="context of 32768"):
        next(engine().generate(make_samples(), SamplingConfig(max_new_tokens=32_768)))


def test_sampling_is_seeded_and_stays_in_the_allowed_set():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    generated = jnp.zeros((1, 4), bool)

    def sampled(**settings):
        sampling_params = SamplingParams.of(SamplingConfig(temperature=1.0, **settings))
        keys = jax.random.split(jax.random.key(0), 400)
        return np.asarray(jax.vmap(lambda key: sample_token(logits, generated, key, sampling_params))(keys))[:, 0]

    assert set(sampled()) == {0, 1, 2, 3}
    assert set(sampled(top_k=2)) == {0, 1}
    assert set(sampled(top_p=0.8)) == {0, 1}
    assert set(sampled(top_p=0.81)) == {0, 1, 2}
    assert set(sampled(top_p=0.01)) == {0}
    share = np.mean(sampled(top_k=2) == 0)
    assert abs(share - 0.5 / 0.8) < 0.08
    sampling = SamplingConfig(max_new_tokens=20, temperature=1.5, seed=1)
    first, second = (run(engine(), make_samples()[:1], sampling) for _ in range(2))
    assert first == second
    assert first != run(engine(), make_samples()[:1], SamplingConfig(max_new_tokens=20, temperature=1.5, seed=2))


def test_logprobs_are_those_of_the_model():
    outputs = list(engine().generate(make_samples()[1:2], SamplingConfig(max_new_tokens=12, logprobs=3)))
    tokens = np.concatenate([output.tokens for output in outputs], 1)
    ids = np.concatenate([output.logprob_ids for output in outputs], 1)
    values = np.concatenate([output.logprobs for output in outputs], 1)
    assert ids.shape == values.shape == (1, 12, 3)
    np.testing.assert_array_equal(ids[..., 0], tokens)
    assert np.all(np.diff(values, axis=-1) <= 0)
    assert np.all(values <= 0)


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}])
def test_invalid_settings_are_refused(settings):
    with pytest.raises(InputError):
        SamplingConfig(**settings)


def test_a_sharded_model_gives_the_same_answers_as_one_device():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    param_shardings = shardings(abstract_params(MODEL.config), param_axes(MODEL.config), mesh)
    sharded = Engine(MODEL, jax.device_put(PARAMS, param_shardings), stop_ids=(), mesh=mesh)
    samples = make_samples()
    assert run(sharded, samples) == run(engine(), samples)
    before = sharded.compiled_programs
    assert run(sharded, samples) == run(engine(), samples)
    assert sharded.compiled_programs == before
