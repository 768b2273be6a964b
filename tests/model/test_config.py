"""Tests the configurations against the released models, and the parameter tree against its configuration."""

import jax
import pytest

from vl3_jax.errors import InputError
from vl3_jax.model import PRESETS, TextConfig, VisionConfig, abstract_params, param_axes, preset


def test_released_parameter_counts():
    small, large = preset("2b"), preset("7b")
    assert small.vision.num_parameters == large.vision.num_parameters == 412_147_440
    assert (small.num_projector_parameters, large.num_projector_parameters) == (4_131_840, 16_980_992)
    assert (small.text.num_layer_parameters, large.text.num_layer_parameters) == (46_797_824, 233_057_792)
    assert (small.num_parameters, large.num_parameters) == (1_959_993_584, 8_044_744_944)
    assert (small.text.num_parameters, large.text.num_parameters) == (1_543_714_304, 7_615_616_512)
    assert (small.text.cache_bytes_per_token, large.text.cache_bytes_per_token) == (28_672, 57_344)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_tree_matches_the_configuration(name):
    config = preset(name)
    tree, axes = abstract_params(config), param_axes(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == config.num_parameters
    jax.tree.map(
        lambda leaf, names: pytest.fail(f"{names}: {leaf.shape}") if len(names) != leaf.ndim else None, tree, axes
    )
    assert ("lm_head" in tree["llm"]) != config.text.tie_word_embeddings


def test_invalid_configurations_are_refused():
    with pytest.raises(InputError, match="unknown model '3b'; known: 2b"):
        preset("3b")
    with pytest.raises(ValueError, match="divisible by 4"):
        VisionConfig(hidden_size=100, num_heads=16)
    with pytest.raises(ValueError, match="do not divide"):
        TextConfig(num_heads=12, num_kv_heads=5)
