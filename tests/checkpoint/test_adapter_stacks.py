"""Adapters beside their base give what each gives merged into it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.adapters import write_adapter
from support.checkpoints import write_small_checkpoint
from support.tolerances import PARITY, relative_error
from vl3_jax.checkpoint import load
from vl3_jax.checkpoint.adapter_stacks import load_adapters, with_adapters
from vl3_jax.errors import InputError
from vl3_jax.model import VideoLLaMA3, decode, unembed
from vl3_jax.model.serving_layout import serving_axes
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import shardings

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def folders(base):
    """Adapters of several ranks, of other modules, and of some layers only."""
    config = load(base).config
    few = ["layers.0.self_attn.v_proj", "gate_proj", "down_proj"]
    return {
        "all": write_adapter(base.parent / "all", config, rank=2, base=base),
        "few": write_adapter(base.parent / "few", config, few, rank=5, seed=1, base=base, use_rslora=True),
    }


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens, adapter=None):
    segments, positions = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decode(model, params, tokens, None, -segments, segments, positions, adapter=adapter)
    return unembed(model, params, hidden)


TOKENS = np.random.default_rng(0).integers(1, 400, (4, 12)).astype(np.int32)
ADAPTER = np.array([0, 1, -1, 0], np.int32)


@pytest.fixture(scope="module")
def merged(base, folders):
    """Logits of each row by the model that its adapter is merged into."""
    models = [load(folder) for folder in (*folders.values(), base)]
    rows = [logits(VideoLLaMA3(model.config), model.params, TOKENS) for model in models]
    assert relative_error(rows[0], rows[2]) > 0.1 < relative_error(rows[1], rows[2])
    return np.stack([rows[number][row] for row, number in enumerate(ADAPTER)])


def test_each_row_equals_the_merged_model(base, folders, merged):
    loaded = load(base, serving=True)
    stacks = load_adapters(folders, loaded.config, dtype=np.float32)
    model, params = VideoLLaMA3(loaded.config, serving=True), with_adapters(loaded.params, stacks)
    assert relative_error(logits(model, params, TOKENS, ADAPTER), merged) <= PARITY
    np.testing.assert_array_equal(logits(model, params, TOKENS), logits(model, loaded.params, TOKENS))


def test_sharded_as_the_kernels_are(base, folders, merged):
    loaded, mesh = load(base, serving=True), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    axes = serving_axes(loaded.config)
    params = jax.device_put(loaded.params, shardings(loaded.params, axes, mesh))
    stacks = load_adapters(folders, loaded.config, dtype=np.float32, mesh=mesh)
    q = stacks["llm"]["layers_0"]["attn"]["adapters"]["q"]
    assert "tensor" in q.b.sharding.spec
    model = VideoLLaMA3(loaded.config, serving=True)
    with jax.set_mesh(mesh):
        assert relative_error(logits(model, with_adapters(params, stacks), TOKENS, ADAPTER), merged) <= PARITY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix": "model.vision_encoder", "modules": ["layers.0.self_attn.q_proj"]}, r"adapts model\.vision_encoder"),
        ({"prefix": "model.mm_projector", "modules": ["readout.0"]}, "adapts model.mm_projector.readout.0.weight"),
        ({"whole": {"base_model.model.model.norm.weight": np.ones(64, np.float32)}}, "model.norm.weight, which was"),
        (
            {"whole": {"base_model.model.lm_head.lora_A.weight": np.ones((2, 64), np.float32)}},
            "incomplete pair: lm_head.weight",
        ),
        (
            {"whole": {f"base_model.model.lm_head.lora_{s}.weight": np.ones((2, 2), np.float32) for s in "AB"}},
            "adapts lm_head.weight; .* merge both with `vl3 convert hf`",
        ),
        ({"rank_pattern": {"q_proj": 3}}, r"does not fit the model: wrong shape: model\.layers.*q_proj.* of rank 3"),
        ({"use_dora": True}, "use_dora"),
    ],
    ids=str,
)
def test_what_cannot_stay_apart_is_refused(tmp_path, base, change, message):
    config = load(base).config
    folder = write_adapter(tmp_path / "adapter", config, **change)
    with pytest.raises(InputError, match=message) as refused:
        load_adapters({"a": folder}, config, dtype=np.float32)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


def test_a_folder_without_an_adapter_is_refused(base):
    with pytest.raises(InputError, match=r"no adapter_config\.json, so no adapter of PEFT"):
        load_adapters({"a": base}, load(base).config, dtype=np.float32)
