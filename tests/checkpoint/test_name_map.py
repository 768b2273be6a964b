"""The name map is complete and invertible, and has the sizes of the released models."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.hf_folders import random_tensors, tiny
from vl3_jax.checkpoint import LAYOUTS, name_map
from vl3_jax.checkpoint.tensors import copy_view
from vl3_jax.model import abstract_params, preset


@pytest.mark.parametrize("name", ["2b", "7b", "tiny", "mid"])
def test_leaves_are_the_models_parameters(name):
    config = preset(name)
    paths = jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]
    expected = {"/".join(key.key for key in path): leaf.shape for path, leaf in paths}
    assert {path: leaf.shape for path, leaf in name_map("official", config).leaves.items()} == expected


@pytest.mark.parametrize(("name", "parameters", "tensors"), [("2b", 1_959_993_584, 778), ("7b", 8_044_744_944, 779)])
@pytest.mark.parametrize("layout", ["official", "official-train", "native"])
def test_sizes_of_the_released_models(name, parameters, tensors, layout):
    names = name_map(layout, preset(name))
    assert len(names.tensors) == tensors
    assert sum(spec.size for spec in names.tensors.values()) == parameters
    assert sum(leaf.size for leaf in names.leaves.values()) == parameters
    assert sum(spec.size for spec in names.tensors.values() if spec.part == "vision") == 412_147_440


def test_sizes_of_the_inputs_of_stage_1():
    assert len(name_map("qwen2", preset("2b")).tensors) == 338
    assert sum(spec.size for spec in name_map("qwen2", preset("2b")).tensors.values()) == 1_543_714_304
    assert len(name_map("qwen2", preset("7b")).tensors) == 339
    assert sum(spec.size for spec in name_map("qwen2", preset("7b")).tensors.values()) == 7_615_616_512
    for layout in ("siglip", "navit"):
        assert len(name_map(layout, preset("2b")).tensors) == 436


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_both_directions_are_inverse_views(layout):
    config = tiny(tied=False)
    for name, tensor in random_tensors(layout, config, "float32").items():
        spec = name_map(layout, config).tensors[name]
        leaf = spec.to_leaf(tensor)
        assert leaf.shape == spec.slice_shape
        assert np.shares_memory(leaf, tensor)
        back = spec.to_tensor(np.ascontiguousarray(leaf))
        np.testing.assert_array_equal(back, tensor)


def test_transforms_match_explicit_transposes():
    config = tiny()
    names = name_map("official", config)
    tensors = random_tensors("official", config, "float32")
    width, heads, size = 64, 4, 16
    conv = "model.vision_encoder.embeddings.patch_embedding.weight"
    np.testing.assert_array_equal(names.tensors[conv].to_leaf(tensors[conv]), tensors[conv].reshape(width, 588).T)
    query = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(
        names.tensors[query].to_leaf(tensors[query]), tensors[query].T.reshape(width, heads, size)
    )
    out = "model.layers.1.self_attn.o_proj.weight"
    np.testing.assert_array_equal(names.tensors[out].to_leaf(tensors[out]), tensors[out].T.reshape(heads, size, width))


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    dtypes=st.sampled_from([("f4", "f4"), ("f2", "f2"), ("f4", "f2"), ("f2", "f4")]),
)
def test_copy_view_copies_any_view(shape, seed, dtypes):
    rng = np.random.default_rng(seed)
    source = rng.standard_normal(shape).astype(dtypes[0]).transpose(rng.permutation(len(shape)))
    region = tuple(slice(0, rng.integers(1, size + 1)) for size in source.shape)
    out = np.empty(source[region].shape, dtypes[1])
    copy_view(out, source[region])
    np.testing.assert_array_equal(out, source[region].astype(dtypes[1]))
