"""Sampling by row: what top-k and top-p keep equals a sorted computation, and other rows change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3_jax.inference import sampling
from vl3_jax.inference.sampling import SamplingParams, sample_tokens
from vl3_jax.inference.sampling_config import SamplingConfig

LOGITS = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
KEEP_TOP_K, KEEP_TOP_P = jax.jit(sampling._keep_top_k), jax.jit(sampling._keep_top_p)


def sampled(rows: int = 400, **options) -> np.ndarray:
    """Samples from the same logits in each of several rows, at positions of their own."""
    params = SamplingParams.of([SamplingConfig(temperature=1.0, **options)] * rows)
    logits = jnp.tile(LOGITS, (rows, 1))
    return np.asarray(sample_tokens(logits, jnp.zeros((rows, 4), bool), jnp.arange(rows), params))


def test_sampling_is_seeded_and_stays_in_the_allowed_set():
    assert set(sampled()) == {0, 1, 2, 3}
    assert set(sampled(top_k=2)) == {0, 1}
    assert set(sampled(top_p=0.79)) == {0, 1}
    assert set(sampled(top_p=0.81)) == {0, 1, 2}
    assert set(sampled(top_p=0.01)) == {0}
    assert abs(np.mean(sampled(top_k=2) == 0) - 0.5 / 0.8) < 0.08
    np.testing.assert_array_equal(sampled(seed=1), sampled(seed=1))
    assert np.any(sampled(seed=1) != sampled(seed=2))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 60), st.floats(0.01, 0.999), st.booleans())
def test_thresholds_keep_what_sorting_keeps(seed, top_k, top_p, ties):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (2, 50)).astype(np.float32)
    logits = np.round(logits) if ties else logits
    kept = np.isfinite(KEEP_TOP_K(jnp.asarray(logits), jnp.array([top_k, 0])))
    smallest = np.sort(logits[0])[::-1][min(top_k, 50) - 1]
    np.testing.assert_array_equal(kept, [logits[0] >= smallest, np.ones(50, bool)])
    kept = np.isfinite(KEEP_TOP_P(jnp.asarray(logits), jnp.array([top_p, 1.0], jnp.float32)))
    probabilities = np.exp(logits[0].astype(np.float64))
    probabilities /= probabilities.sum()
    mass_above = np.array([probabilities[logits[0] > value].sum() for value in logits[0]])
    decided = np.abs(mass_above - top_p) > 1e-5
    np.testing.assert_array_equal(kept[0][decided], (mass_above < top_p)[decided])
    assert kept[1].all()


def test_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(0)
    configs = [
        SamplingConfig(),
        SamplingConfig(temperature=0.5, seed=3),
        SamplingConfig(temperature=2.0, top_k=4, seed=4),
        SamplingConfig(temperature=1.0, top_p=0.6, repetition_penalty=2.0, seed=4),
    ]
    logits = jnp.asarray(rng.normal(0, 2, (4, 100)), jnp.float32)
    generated, positions = jnp.asarray(rng.random((4, 100)) < 0.3), jnp.arange(4) + 7
    together = sample_tokens(logits, generated, positions, SamplingParams.of(configs))
    for row, config in enumerate(configs):
        one = slice(row, row + 1)
        alone = sample_tokens(logits[one], generated[one], positions[one], SamplingParams.of([config]))
        assert int(alone[0]) == int(together[row])


def test_no_vocabulary_is_sorted():
    params = SamplingParams.of([SamplingConfig(temperature=1.0, top_k=3, top_p=0.5)])
    arguments = (jnp.zeros((1, 64)), jnp.zeros((1, 64), bool), jnp.zeros(1, jnp.int32), params)
    assert "sort" not in str(jax.make_jaxpr(sample_tokens)(*arguments))
