"""Adapters of every kind that PEFT makes are merged as PEFT merges them, or refused in one line."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from support.hf_folders import renamed, tiny, write_json
from support.tolerances import REORDERED
from vl3_jax.checkpoint import open_source
from vl3_jax.checkpoint.peft_config import parse_adapter_config
from vl3_jax.errors import InputError
from vl3_jax.json_file import JsonObject

peft_models = pytest.importorskip("support.peft_models")
peft = peft_models.peft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

CONFIG = tiny(tied=False)
MODULES = ["q_proj", "v_proj", "down_proj"]
# What PEFT calls the modules of the layer that some patterns name.
NAMES = {"native": "model.language_model.layers.1", "official": "model.layers.1"}


@pytest.fixture(scope="module", params=["native", "official"])
def base(request, tmp_path_factory):
    """Layout, folder and torch model of an untied base."""
    folder = tmp_path_factory.mktemp("base") / "model"
    return request.param, folder, peft_models.write_base(folder, request.param, CONFIG)


def assert_equal(folder, base, expected: dict[str, np.ndarray]) -> None:
    layout, path, _ = base
    ours = open_source(folder, base=str(path)).tensors
    unmerged, changed = renamed(load_file(path / "model.safetensors"), layout, "official", CONFIG), 0
    for name, tensor in renamed(expected, layout, "official", CONFIG).items():
        np.testing.assert_allclose(ours.array(name), tensor, rtol=REORDERED, atol=REORDERED, err_msg=name)
        changed += not np.array_equal(tensor, unmerged[name])
    assert changed


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"target_modules": "all-linear"},
        {
            "target_modules": [*MODULES, "out_proj", "fc1", "readout.0"],
            "exclude_modules": ["layers.0.self_attn.q_proj"],
        },
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["projector", "norm", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "lora_dropout": 0.1},
        {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
        {"target_modules": ["patch_embedding"]},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "gaussian", "ensure_weight_tying": True},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": False, "r": 3},
    ],
    ids=str,
)
def test_merged_as_by_peft(tmp_path, base, settings):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": MODULES} | settings)
    peft_models.save_adapter(base[2], tmp_path / "run", config)
    assert_equal(tmp_path / "run", base, peft_models.merged(base[2], tmp_path / "run"))


def test_patterns_match_the_names_in_training(tmp_path, base):
    module = NAMES[base[0]]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=MODULES,
        rank_pattern={rf"^{module}.self_attn.q_proj": 2, "(k|v)_proj": 6, "proj": 99},
        alpha_pattern={f"{module}.mlp.down_proj": 11, r"layers\.\d+\.self_attn\.v_proj": 0.5, "^q_proj": 99},
    )
    peft_models.save_adapter(base[2], tmp_path / "run", config)
    assert_equal(tmp_path / "run", base, peft_models.merged(base[2], tmp_path / "run"))


def test_an_adapted_head_that_is_saved_whole_gets_both(tmp_path, base):
    peft_models.save_adapter(base[2], tmp_path / "run", peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    path = tmp_path / "run" / "adapter_model.safetensors"
    stored = load_file(path)
    head = "base_model.model.lm_head.base_layer.weight"
    whole = np.random.default_rng(0).standard_normal((CONFIG.text.vocab_size, CONFIG.text.hidden_size), np.float32)
    save_file(stored | {head: whole}, path)
    expected = peft_models.merged(base[2], tmp_path / "run")
    assert not np.array_equal(expected["lm_head.weight"], whole)
    assert_equal(tmp_path / "run", base, expected)


def test_patterns_that_backtrack_end_at_once():
    hostile = {"(a+)+b": 2, "(a|a)*" * 20 + "b": 3, ".*" * 30 + "b": 4, "(.*a){25}b": 5}
    config = parse_adapter_config(JsonObject({"peft_type": "LORA", "rank_pattern": hostile}, "adapter_config.json"))
    assert config.module_rank("a" * 500) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights is 'pissa_niter_2'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens is \[1, 2\]"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
        ({"kasa_config": peft.tuners.lora.config.KasaConfig()}, "kasa_config is {"),
        ({"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=8)}, "velora_config is {"),
    ],
    ids=str,
)
def test_other_arithmetic_is_refused(tmp_path, base, settings, message):
    if base[0] == "official" and "trainable_token_indices" in settings:
        settings = {"trainable_token_indices": {"embed_tokens": [3]}}
        message = "trainable_token_indices is {"
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | settings)
    peft_models.save_adapter(base[2], tmp_path / "run", config)
    with pytest.raises(InputError, match=f"adapter_config.json: {message}.* merge the adapter into its base with PEFT"):
        open_source(tmp_path / "run", base=str(base[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
            "init_lora_weights is 'loftq'; that is not supported",
        ),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'; that is not supported"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'; that is not supported"),
        ({"use_qalora": True}, "use_qalora is True; that is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is .*; that is not supported"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is .*; that is not supported"),
        ({"a_key_of_tomorrow": "x" * 1000}, r"a_key_of_tomorrow is 'x+\.\.\.x+'; that is not supported"),
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'; only LORA is supported"),
        ({"peft_type": None}, "peft_type is None; only LORA is supported"),
        ({"r": 8}, "the adapter does not fit its base: wrong shape: .* of rank 8"),
        ({"r": True}, "r is True; expected an integer from 1"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; expected a number"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern\.\( is 2; its key is no regular expression"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, r"rank_pattern\.\(\?i\)q_proj is 2; its key is no regular expression"),
        ({"rank_pattern": {"(?=q)q_proj": 2}}, r"q_proj is 2; its key needs more than a linear search"),
        ({"alpha_pattern": {"(a+)\\1": 2}}, r"is 2; its key needs more than a linear search"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]; expected an object"),
        ({"modules_to_save": ["lm_head"]}, "in modules_to_save but not stored: lm_head.weight"),
        ([], r"holds \[\], and an object is expected"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(tmp_path, base, change, message):
    peft_models.save_adapter(base[2], tmp_path / "run", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    path = tmp_path / "run" / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | change if isinstance(change, dict) else change)
    with pytest.raises(InputError, match=message) as error:
        open_source(tmp_path / "run", base=str(base[1]))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.LoKrConfig, peft.IA3Config, peft.OFTConfig])
def test_other_kinds_of_adapters_are_refused(tmp_path, base, kind):
    options = {"feedforward_modules": []} if kind is peft.IA3Config else {}
    peft_models.save_adapter(base[2], tmp_path / "run", kind(target_modules=["q_proj"], **options))
    with pytest.raises(InputError, match="only LORA is"):
        open_source(tmp_path / "run", base=str(base[1]))


def test_an_adapter_of_itself_is_refused(tmp_path, base):
    peft_models.save_adapter(base[2], tmp_path / "run", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="is an adapter of itself"):
        open_source(tmp_path / "run", base=str(tmp_path / "run"))


def test_two_adapters_in_one_file_are_refused(tmp_path, base):
    peft_models.save_adapter(base[2], tmp_path / "run", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    path = tmp_path / "run" / "adapter_model.safetensors"
    stored = load_file(path)
    save_file(stored | {name.replace(".weight", ".other.weight"): tensor for name, tensor in stored.items()}, path)
    with pytest.raises(InputError, match="save one adapter alone"):
        open_source(tmp_path / "run", base=str(base[1]))


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ],
    ids=str,
)
def test_tied_embeddings(tmp_path, settings, fits):
    """An adapter that keeps head and embeddings tied is merged; one that parts them is refused."""
    model = peft_models.write_base(tmp_path / "base", "native", tiny(tied=True))
    peft_models.save_adapter(model, tmp_path / "run", peft.LoraConfig(r=4, **settings))
    if not fits:
        with pytest.raises(InputError, match="trains one of lm_head and embed_tokens, which its base ties"):
            open_source(tmp_path / "run", base=str(tmp_path / "base"))
        return
    expected = peft_models.merged(model, tmp_path / "run")
    ours = open_source(tmp_path / "run", base=str(tmp_path / "base")).tensors
    for name in ("embed_tokens", "layers.0.self_attn.q_proj"):
        theirs = expected[f"model.language_model.{name}.weight"]
        np.testing.assert_allclose(ours.array(f"model.{name}.weight"), theirs, rtol=REORDERED, atol=REORDERED)
    np.testing.assert_array_equal(expected["lm_head.weight"], expected["model.language_model.embed_tokens.weight"])
