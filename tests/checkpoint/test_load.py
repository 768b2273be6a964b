"""`load` restores any source to any mesh and dtype without a second copy in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.hf_folders import read_tensors, tiny, write_folder
from vl3_jax.checkpoint import leaf_filling, load, name_map, open_source, write_orbax
from vl3_jax.errors import InputError
from vl3_jax.model import abstract_params, param_axes
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import shardings


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    tensors = write_folder(folder / "hf", "native", tiny(tied=False))
    write_orbax(open_source(folder / "hf"), folder / "orbax", quiet=True)
    return folder, tensors


def expected(tensors) -> dict[str, np.ndarray]:
    leaves = {}
    for path, leaf in name_map("native", tiny(tied=False)).leaves.items():
        slices = [np.ascontiguousarray(spec.to_leaf(tensors[spec.name])) for spec in leaf.tensors]
        leaves[path] = np.stack(slices) if leaf.stacked else slices[0]
    return leaves


def flat(params) -> dict:
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


@pytest.mark.parametrize("dtype", [None, "float32", jnp.bfloat16])
@pytest.mark.parametrize("mesh", [None, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("source", ["hf", "orbax"])
def test_values_and_shardings(folders, source, mesh, dtype):
    folder, tensors = folders
    mesh = make_mesh(mesh) if mesh else None
    checkpoint = load(folder / source, dtype=dtype, mesh=mesh)
    params = flat(checkpoint.params)
    for path, leaf in expected(tensors).items():
        leaf_dtype = np.float32 if dtype == "float32" else leaf.dtype
        assert params[path].dtype == leaf_dtype
        np.testing.assert_array_equal(np.asarray(params[path]), leaf.astype(leaf_dtype))
    if mesh:
        config = tiny(tied=False)
        expected_shardings = flat(shardings(abstract_params(config), param_axes(config), mesh))
        assert {path: leaf.sharding for path, leaf in params.items()} == expected_shardings
    assert checkpoint.config == tiny(tied=False)
    assert (checkpoint.files / "tokenizer.json").is_file()
    assert (checkpoint.source.kind, checkpoint.source.files_kind) == (
        {"hf": "native", "orbax": "orbax"}[source],
        "native",
    )


def test_explicit_shardings(folders):
    folder, _ = folders
    device = jax.devices()[3]
    single = jax.sharding.SingleDeviceSharding(device)
    checkpoint = load(folder / "orbax", shardings=single)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(checkpoint.params))
    with pytest.raises(InputError, match=r"no entry for llm/"):
        load(folder / "orbax", shardings={"vision": jax.tree.map(lambda _: single, checkpoint.params["vision"])})


def test_host_buffers_become_the_arrays(folders, monkeypatch):
    """On the CPU backend the arrays use the buffers that were read into, without a copy."""
    folder, _ = folders
    buffers, original = [], leaf_filling.aligned
    monkeypatch.setattr(leaf_filling, "aligned", lambda *a: buffers.append(original(*a)) or buffers[-1])
    params = load(folder / "orbax").params
    addresses = {buffer.ctypes.data for buffer in buffers}
    pointers = [leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]
    assert set(pointers) == addresses


def test_missing_or_truncated_chunk_is_an_error(folders, tmp_path):
    import shutil

    folder, _ = folders
    for damage in ("missing", "truncated"):
        shutil.copytree(folder / "orbax", tmp_path / damage)
        chunk = next((tmp_path / damage / "llm.layers.mlp.up.kernel").glob("1.*"))
        chunk.unlink() if damage == "missing" else chunk.write_bytes(chunk.read_bytes()[:-2])
        with pytest.raises(InputError, match=r"llm/layers/mlp/up/kernel cannot be read"):
            load(tmp_path / damage)


def test_import_initialises_no_backend_and_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, vl3_jax.checkpoint; from jax._src import xla_bridge; "
        "assert not xla_bridge._backends; "
        "assert not {'torch', 'transformers', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_folder_is_unchanged_by_loading(folders):
    folder, tensors = folders
    assert set(read_tensors(folder / "hf")) == set(tensors)
