"""Exported checkpoints load in transformers without missing or unexpected keys and give the same logits."""

import json

import numpy as np
import pytest

from support import reference
from support.hf_folders import tiny, tokenizer_files, write_folder, write_json
from support.samples import random_sample, random_visual
from vl3_jax.cli.main import main

torch = reference.torch


def convert(*arguments) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


def load(folder):
    from transformers import VideoLlama3ForConditionalGeneration

    model, info = VideoLlama3ForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits(model, samples) -> np.ndarray:
    with torch.no_grad():
        return model(**reference.model_inputs(samples), use_cache=False).logits.numpy()


def image_and_video():
    rng = np.random.default_rng(0)
    return random_sample(rng, [random_visual(rng, (1, 4, 6), 1), random_visual(rng, (3, 4, 4), 2, still=0.5)])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("route", ["native", "official"])
def test_saved_by_transformers_and_back(tmp_path, tied, route):
    """The reference has the same logits after a round trip from save_pretrained through Orbax to native.

    The official route goes through an official export and a second Orbax folder.
    """
    model = reference.reference_model(tiny(tied))
    model.save_pretrained(tmp_path / "saved")
    for name, content in tokenizer_files(official=False).items():
        write_json(tmp_path / "saved" / name, content)
    convert("hf", tmp_path / "saved", tmp_path / "o")
    if route == "official":
        convert("export", tmp_path / "o", tmp_path / "official", "--format", "official")
        convert("hf", tmp_path / "official", tmp_path / "o2")
        convert("export", tmp_path / "o2", tmp_path / "b", "--format", "native")
    else:
        convert("export", tmp_path / "o", tmp_path / "b", "--format", "native")
        before, after = ((tmp_path / name / "config.json").read_bytes() for name in ("saved", "b"))
        assert before == after
    again = load(tmp_path / "b")
    for (name, before), (_, after) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(before, after), name
    samples = [image_and_video()]
    np.testing.assert_array_equal(logits(again, samples), logits(model, samples))
    if route == "official":
        config = json.loads((tmp_path / "b" / "config.json").read_text())
        assert config["text_config"]["rope_theta"] == tiny().text.rope_theta


@pytest.mark.parametrize("layout", ["official", "official-train"])
def test_official_weights_load_as_native(tmp_path, layout):
    write_folder(tmp_path / "a", layout, tiny(tied=False), "bfloat16")
    convert("hf", tmp_path / "a", tmp_path / "o")
    convert("export", tmp_path / "o", tmp_path / "b", "--format", "native")
    model = load(tmp_path / "b")
    assert model.config.image_token_id == 500
    assert model.config.text_config.rope_parameters["rope_theta"] == tiny().text.rope_theta


def test_logits_match_transformers_after_a_conversion(tmp_path):
    """A checkpoint saved by transformers and converted to Orbax gives the logits of transformers in this package."""
    import jax.numpy as jnp

    from support.forward import forward
    from support.samples import shape_for
    from support.tolerances import PARITY, relative_error
    from vl3_jax.checkpoint import load as load_params
    from vl3_jax.model import VideoLLaMA3
    from vl3_jax.processing.packed_batch import pack

    model = reference.reference_model(tiny(tied=False))
    model.save_pretrained(tmp_path / "saved")
    convert("hf", tmp_path / "saved", tmp_path / "o")
    checkpoint = load_params(tmp_path / "o")
    sample = image_and_video()
    batch = pack([[sample]], shape_for([[sample]]))
    arrays = {key: jnp.asarray(value) for key, value in batch.items() if isinstance(value, np.ndarray)}
    jax_logits = forward(VideoLLaMA3(checkpoint.config), checkpoint.params, arrays)
    length = len(sample.tokens)
    assert relative_error(np.asarray(jax_logits)[0, :length], logits(model, [sample])[0]) < PARITY


def test_processors_of_an_export_load(tmp_path):
    from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

    write_folder(tmp_path / "a", "official", tiny())
    convert("hf", tmp_path / "a", tmp_path / "o")
    convert("export", tmp_path / "o", tmp_path / "b", "--format", "native")
    processor = VideoLlama3ImageProcessorPil.from_pretrained(tmp_path / "b")
    assert dict(processor.size) == {"shortest_edge": 3136, "longest_edge": 12_000 * 196}
    assert list(processor.image_mean) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("message", "options", "text"),
    [
        ({"role": "user", "content": "Hi"}, {}, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {},
            "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            {"role": "user", "content": [{"type": "video", "num_frames": 2, "timestamps": [0, 10]}, "Q"]},
            {},
            "<|im_start|>user\nTime 0.0s:<image>,Time 10.0s:<image>\nQ<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            {"role": "user", "content": [{"type": "video", "num_frames": 2}, "Q"]},
            {},
            "<|im_start|>user\n<image>,<image>\nQ<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            {"role": "stream", "content": [{"type": "image", "timestamp": 1}]},
            {},
            "<|stream_start|>stream\nTime 1.0s: <image>\n<|stream_end|><|im_start|>assistant\n",
        ),
    ],
)
def test_official_template(message, options, text):
    import jinja2

    from vl3_jax.checkpoint.tokenizer_files import OFFICIAL_TEMPLATE

    rendered = jinja2.Template(OFFICIAL_TEMPLATE).render(messages=[message], add_generation_prompt=True, **options)
    assert rendered == text


def test_native_template():
    import jinja2

    from vl3_jax.checkpoint.tokenizer_files import NATIVE_TEMPLATE

    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Q"}]
    rendered = jinja2.Template(NATIVE_TEMPLATE).render(messages=[{"role": "user", "content": content}])
    assert rendered == "<|im_start|>user\n<|image_pad|>\n<|video_pad|>\nQ<|im_end|>\n"
