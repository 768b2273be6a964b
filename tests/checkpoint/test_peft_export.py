"""Exported adapters give the same logits and the same text in PEFT, on bases of either layout, as here."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

from support.forward import forward
from support.hf_folders import tiny, write_folder
from support.samples import random_sample, random_visual, shape_for
from support.tolerances import PARITY, relative_error
from vl3_jax.checkpoint import load, open_source, peft_base, write_adapters
from vl3_jax.checkpoint.sources import Origin
from vl3_jax.errors import InputError
from vl3_jax.model import VideoLLaMA3
from vl3_jax.model.linear import LoraKernel
from vl3_jax.processing.packed_batch import Sample, pack
from vl3_jax.training.groups import map_paths
from vl3_jax.training.lora import LLM, TOWER, add_adapters

peft_models = pytest.importorskip("support.peft_models")
reference = pytest.importorskip("support.reference")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
PATTERNS = (*LLM, *TOWER, "vision/patch_embed/kernel")
GENERATED = 6


def trained(params: dict) -> tuple[dict, dict]:
    """Returns parameters as after a run, and which were trained whole: projector, embeddings, some norms, biases."""
    rng = np.random.default_rng(0)
    adapted = add_adapters(params, jax.random.key(0), PATTERNS, rank=4, alpha=6.0)

    def is_whole(path: str) -> bool:
        return path.startswith(("projector", "llm/embed", "llm/norm")) or path.endswith(("/bias", "ln_mlp/scale"))

    def train(path: str, leaf: jax.Array) -> jax.Array:
        learned = is_whole(path) or path.endswith(("/a", "/b"))
        return leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32) if learned else leaf

    return map_paths(train, adapted), map_paths(lambda path, _: is_whole(path), params)


def samples() -> dict[str, Sample]:
    rng = np.random.default_rng(1)
    clip = random_visual(rng, (3, 4, 4), 2, still=0.5)
    visuals = {"text": [], "image": [random_visual(rng, (1, 4, 6), 1)], "clip": [clip]}
    return {name: random_sample(rng, visual) for name, visual in visuals.items()}


def reference_logits(model, sample: Sample) -> np.ndarray:
    with reference.torch.no_grad():
        return model(**reference.model_inputs([sample]), use_cache=False).logits.numpy()[0]


def longer(sample: Sample, token: int) -> Sample:
    return dataclasses.replace(
        sample,
        tokens=np.append(sample.tokens, token),
        is_vision=np.append(sample.is_vision, False),
        loss_weight=np.append(sample.loss_weight, 1.0),
    )


@pytest.mark.parametrize(
    ("layout", "tied"),
    [("native", True), ("official", False)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("native", False), ("official", True))],
)
def test_logits_and_text_equal_those_of_peft(tmp_path, layout, tied):
    config = tiny(tied)
    model = peft_models.write_base(tmp_path / "base", layout, config)
    params, whole = trained(load(tmp_path / "base").params)
    write_adapters(tmp_path / "run", params, config, base=str(tmp_path / "base"), layout=layout, whole=whole)
    adapted = peft_models.peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "run").eval()
    texts, theirs = [], []
    for name, sample in samples().items():
        text = sample
        for _ in range(GENERATED):
            text = longer(text, int(reference_logits(adapted, text)[-1].argmax()))
        texts.append(text)
        theirs.append(reference_logits(adapted, text))
        assert relative_error(theirs[-1], reference_logits(model, text)) > 0.1, name
    batch = pack([texts], shape_for([texts]))
    arrays = {key: jax.numpy.asarray(value) for key, value in batch.items() if isinstance(value, np.ndarray)}
    ours = np.asarray(forward(VideoLLaMA3(config), load(tmp_path / "run").params, arrays))[0]
    for text, logits in zip(texts, theirs, strict=True):
        length = len(text.tokens)
        assert relative_error(ours[:length], logits) < PARITY
        greedy = ours[length - GENERATED - 1 : length - 1].argmax(-1)
        np.testing.assert_array_equal(greedy, text.tokens[-GENERATED:])
        ours = ours[length:]


def test_transformers_finds_the_base(tmp_path):
    from transformers import AutoModelForImageTextToText

    config = tiny()
    model = peft_models.write_base(tmp_path / "base", "native", config)
    params, whole = trained(load(tmp_path / "base").params)
    write_adapters(tmp_path / "run", params, config, base=str(tmp_path / "base"), layout="native", whole=whole)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "run", dtype="float32").eval()
    adapted = peft_models.peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "run").eval()
    sample = samples()["clip"]
    np.testing.assert_array_equal(reference_logits(loaded, sample), reference_logits(adapted, sample))


@pytest.mark.parametrize("layout", ["native", "official", "official-train"])
@pytest.mark.parametrize("tied", [True, False])
def test_read_back_as_trained(tmp_path, layout, tied):
    config = tiny(tied)
    write_folder(tmp_path / "base", layout, config, "float32")
    base = open_source(tmp_path / "base")
    params, whole = trained(load(base).params)
    write_adapters(tmp_path / "run", params, base.config, base=str(tmp_path / "base"), layout=layout, whole=whole)
    expected = {path: leaf for path, leaf in _nodes(params).items() if not isinstance(leaf, LoraKernel)}
    loaded = _nodes(load(tmp_path / "run").params)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)


def _nodes(tree) -> dict:
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, LoraKernel))
    return {jax.tree_util.keystr(path): node for path, node in nodes}


def test_stored_type_and_revision(tmp_path):
    config = tiny()
    params, whole = trained(peft_models_params(config))
    write_adapters(
        tmp_path / "run", params, config, base="some/base@v2", whole=whole, dtype=np.dtype(jax.numpy.bfloat16)
    )
    header = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    assert b'"BF16"' in header
    assert b'"F32"' not in header
    content = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (content["base_model_name_or_path"], content["revision"]) == ("some/base", "v2")


def peft_models_params(config) -> dict:
    return reference.native_params(reference.tensors(reference.reference_model(config)), config)


def test_base_and_layout(tmp_path):
    """The base is the start of the run or the one given, and the layout is that of the base."""
    config = tiny()
    for layout in ("native", "official-train"):
        write_folder(tmp_path / layout, layout, config)
    write_folder(tmp_path / "untied", "native", tiny(tied=False))
    native, trainer = (str(tmp_path / layout) for layout in ("native", "official-train"))
    hub = Origin("owner/model@main", "official")
    assert peft_base("run", config, None, None, hub) == hub
    assert peft_base("run", config, None, None, Origin(native, "native")) == Origin(native, "native")
    assert peft_base("run", config, trainer, None, hub) == Origin(trainer, "official-train")
    assert peft_base("run", config, native, "native", None) == Origin(native, "native")
    assert peft_base("run", config, "owner/other", "native", hub) == Origin("owner/other", "native")
    for base, layout, origin, message in [
        (None, None, None, "began from no Hugging Face model; export its start"),
        (None, None, Origin("gs://bucket/model", "native"), "began from gs://bucket/model, which PEFT cannot load"),
        (None, None, Origin("/gone/model", "native"), "/gone/model: no such folder"),
        (None, "native", hub, "--layout native: owner/model@main has the layout official"),
        (native, "official", hub, "has the layout native"),
        ("owner/other", None, hub, "of which layout is it"),
        ("no folder", "native", hub, "no folder: no such folder, and no Hub id"),
        (str(tmp_path / "untied"), None, hub, "not a complete model of the shape of run"),
    ]:
        with pytest.raises(InputError, match=message):
            peft_base("run", config, base, layout, origin)
