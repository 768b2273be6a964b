"""Leaves for serving are filled from a checkpoint as if the whole model had been loaded, converted and quantised."""

import functools
import threading

import jax
import numpy as np
import pytest

from support.hf_folders import tiny, write_folder
from vl3_jax.checkpoint import leaf_filling, load, loading, open_source, write_orbax
from vl3_jax.errors import InputError
from vl3_jax.model.serving_layout import to_serving
from vl3_jax.parallel.mesh import make_mesh

MESHES = {"one": None, "mesh": {"data": 4, "tensor": 2}}
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    write_folder(folder / "hf", "native", tiny(tied=False))
    write_orbax(open_source(folder / "hf"), folder / "orbax", quiet=True)
    return folder


@functools.cache
def converted(folder, quantize) -> dict:
    return to_serving(load(folder / "hf").params, tiny(tied=False), quantize)


def assert_same(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), err_msg=str(path))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("source", ["hf", "orbax"])
def test_leaves_equal_those_converted_in_memory(folders, monkeypatch, source, quantize, mesh):
    monkeypatch.setattr(leaf_filling, "_PART_BYTES", 4096)  # several parts of each leaf
    mesh = make_mesh(MESHES[mesh]) if MESHES[mesh] else None
    params = load(folders / source, serving=True, quantize=quantize, mesh=mesh).params
    assert_same(params, converted(folders, quantize))


@pytest.mark.parametrize("mesh", MESHES)
def test_stacks_are_filled_layer_by_layer_on_the_device(folders, monkeypatch, mesh):
    """As on an accelerator: a leaf is made there, and one layer after another is written into it in place."""
    filled, setter = set(), loading.layer_setter
    monkeypatch.setattr(loading, "is_layerwise", lambda leaf, sharding: leaf.stacked)
    monkeypatch.setattr(loading, "layer_setter", lambda sharding: filled.add(sharding) or setter(sharding))
    mesh = make_mesh(MESHES[mesh]) if MESHES[mesh] else None
    assert_same(load(folders / "hf", mesh=mesh).params, load(folders / "orbax").params)
    assert filled


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_chip_needs_nothing_besides_the_weights(folders, monkeypatch, quantize, mesh):
    """As on an accelerator: arrays are copied to their places, and no program runs, which could need more."""
    monkeypatch.setattr(loading, "is_layerwise", lambda leaf, sharding: leaf.stacked)
    mesh = make_mesh(MESHES[mesh]) if MESHES[mesh] else None
    assert not _compiled(lambda: load(folders / "hf", serving=True, quantize=quantize, mesh=mesh))
    assert _compiled(lambda: load(folders / "hf", mesh=mesh))  # as the stacks of training do


def _compiled(run) -> int:
    """Returns the number of programs that are compiled while a function runs."""
    found = []

    def listen(event, duration, **_):
        found.extend([event] * (event == "/jax/core/compile/backend_compile_duration"))

    jax.clear_caches()
    loading.layer_setter.cache_clear()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(found)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_a_host_holds_at_a_time(folders, monkeypatch, quantize):
    """Each thread holds one leaf; the largest are held together, because they are the first."""
    sizes = [leaf.nbytes for leaf in loading.leaves_to_load(open_source(folders / "hf"), None, True, quantize)]
    held, most, lock, arrays = [], [], threading.Lock(), loading._arrays
    first = threading.Barrier(loading.MOST_WORKERS, timeout=60)

    def watched(source, leaf, *others):
        with lock:
            held.append(leaf.nbytes)
            most.append(sum(held))
            is_first = len(most) <= loading.MOST_WORKERS
        if is_first:
            first.wait()
        result = arrays(source, leaf, *others)
        with lock:
            held.remove(leaf.nbytes)
        return result

    monkeypatch.setattr(loading, "WORKERS", loading.MOST_WORKERS)
    monkeypatch.setattr(loading, "_arrays", watched)
    params = load(folders / "hf", serving=True, quantize=quantize).params
    assert max(most) == loading.most_on_host(sizes)
    assert sum(sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_embeddings_stay_in_a_narrower_type(tmp_path):
    write_folder(tmp_path / "m", "native", tiny(), dtype="bfloat16")
    params = load(tmp_path / "m", dtype="float32", serving=True).params
    assert params["llm"]["embed"]["embedding"].dtype == "bfloat16"
    assert params["llm"]["norm"]["scale"].dtype == "float32"
    assert load(tmp_path / "m", dtype="float32").params["llm"]["embed"]["embedding"].dtype == "float32"


def test_a_tied_head_is_split_as_its_embeddings(tmp_path):
    write_folder(tmp_path / "m", "native", tiny())
    params = load(tmp_path / "m", serving=True, quantize="int8", mesh=make_mesh(MESHES["mesh"])).params
    assert_same(params, to_serving(load(tmp_path / "m").params, tiny(), "int8"))
    head, embedding = params["llm"]["tied_head"], params["llm"]["embed"]["embedding"]
    assert head.values.sharding == embedding.sharding


def test_int8_is_for_serving_only(tmp_path):
    write_folder(tmp_path / "m", "native", tiny())
    with pytest.raises(InputError, match="for serving only; add serving=True"):
        load(tmp_path / "m", quantize="int8")


def test_half_a_model_is_refused(tmp_path):
    write_folder(tmp_path / "m", "qwen2", tiny())
    with pytest.raises(InputError, match=r"holds only llm; make a whole model of it"):
        load(tmp_path / "m", serving=True)
