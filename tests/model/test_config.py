"""Tests the configurations against the released models, and the parameter tree against its configuration."""

import jax
import pytest

from vl3_jax.errors import InputError
from vl3_jax.model import PRESETS, TextConfig, VisionConfig, abstract_params, num_parameters, param_axes, preset


def test_released_parameter_counts():
    small, large = (abstract_params(preset(name)) for name in ("2b", "7b"))
    assert num_parameters(small["vision"]) == num_parameters(large["vision"]) == 412_147_440
    assert (num_parameters(small["projector"]), num_parameters(large["projector"])) == (4_131_840, 16_980_992)
    layers = [num_parameters(tree["llm"]["layers"]) // 28 for tree in (small, large)]
    assert layers == [46_797_824, 233_057_792]
    assert (num_parameters(small), num_parameters(large)) == (1_959_993_584, 8_044_744_944)
    assert (num_parameters(small["llm"]), num_parameters(large["llm"])) == (1_543_714_304, 7_615_616_512)
    assert [preset(name).text.cached_values_per_token for name in ("2b", "7b")] == [14_336, 28_672]


SIZES = {"2b": 1_959_993_584, "7b": 8_044_744_944, "tiny": 220_160, "nano": 1_452_704, "mid": 43_484_800}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_tree_matches_the_configuration(name):
    config = preset(name)
    tree, axes = abstract_params(config), param_axes(config)
    assert num_parameters(tree) == SIZES[name]
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
