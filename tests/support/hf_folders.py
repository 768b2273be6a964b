"""Writes small Hugging Face folders of every layout with safetensors and NumPy alone."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from vl3_jax.checkpoint.names import DROPPABLE, name_map
from vl3_jax.model import ModelConfig, TextConfig, preset

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
IMAGE_TOKEN = 505
SPECIAL = {"<|endoftext|>": 490, "<|im_start|>": 491, "<|im_end|>": 492, "<|image_pad|>": 500, "<|video_pad|>": 501}


def tiny(tied: bool = True) -> ModelConfig:
    config = preset("tiny")
    return dataclasses.replace(config, text=dataclasses.replace(config.text, tie_word_embeddings=tied))


def random_tensors(layout: str, config: ModelConfig, dtype="bfloat16", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (0.1 * rng.standard_normal(spec.shape, np.float32)).astype(DTYPES[dtype])
        for name, spec in name_map(layout, config).tensors.items()
    }


def vision_json(config: ModelConfig) -> dict:
    vision = config.vision
    return {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "patch_size": vision.patch_size,
    }


def text_json(config: ModelConfig) -> dict:
    text: TextConfig = config.text
    return {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "vocab_size": text.vocab_size,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "max_position_embeddings": text.max_position_embeddings,
        "tie_word_embeddings": text.tie_word_embeddings,
        "bos_token_id": 490,
        "eos_token_id": 492,
    }


def config_json(layout: str, config: ModelConfig, dtype: str = "bfloat16") -> dict:
    common = {"torch_dtype": dtype}
    if layout in ("official", "official-train"):
        content = {
            **common,
            **text_json(config),
            "model_type": "videollama3_qwen2",
            "image_token_index": IMAGE_TOKEN,
            "mm_projector_type": "mlp2x_gelu",
            "use_token_compression": True,
            "vision_encoder": None,
            "vision_encoder_config": {"model_type": "videollama3_vision_encoder", **vision_json(config)},
        }
        if layout == "official-train":
            del content["vision_encoder_config"]
            content |= {"vision_encoder": "DAMO-NLP-SG/SigLIP-NaViT", "llm_lr": 1e-5, "is_alignment": False}
        return content
    if layout == "native":
        return {
            "model_type": "video_llama_3",
            "architectures": ["VideoLlama3ForConditionalGeneration"],
            "dtype": dtype,
            "image_token_id": SPECIAL["<|image_pad|>"],
            "video_token_id": SPECIAL["<|video_pad|>"],
            "text_config": {"model_type": "qwen2", **text_json(config)},
            "vision_config": {"model_type": "video_llama_3_vision", **vision_json(config)},
        }
    if layout == "qwen2":
        return {**common, "model_type": "qwen2", **text_json(config)}
    if layout == "siglip":
        return {**common, "model_type": "siglip", "vision_config": vision_json(config), "text_config": {}}
    return {**common, "model_type": "videollama3_vision_encoder", **vision_json(config)}


def tokenizer_files(official: bool) -> dict[str, object]:
    added = dict(SPECIAL)
    if official:
        added |= {"<image>": IMAGE_TOKEN, "<|stream_start|>": 506, "<|stream_end|>": 507}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [{"id": number, "content": text, **flags} for text, number in added.items()],
            "model": {"type": "BPE", "vocab": {chr(0x4E00 + i): i for i in range(490)}, "merges": []},
        },
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(number): {"content": text, **flags} for text, number in added.items()}
        },
        "generation_config.json": {"eos_token_id": [492, 490], "repetition_penalty": 1.05},
    }


def processor_files(layout: str) -> dict[str, object]:
    pixels = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "patch_size": 14, "resample": 3}
    if layout.startswith("official"):
        return {
            "preprocessor_config.json": {**pixels, "min_tokens": 16, "max_tokens": 12_000},
            "processor_config.json": {"image_merge_size": 1, "video_merge_size": 2, "fps": 1, "max_frames": 160},
            "chat_template.json": {"chat_template": "official"},
        }
    if layout == "native":
        image = {"min_pixels": 3136, "max_pixels": 12_000 * 196, "merge_size": 1}
        video = {"min_pixels": 12_544, "max_pixels": 12_000 * 784, "merge_size": 2, "max_frames": 160}
        return {
            "preprocessor_config.json": {**pixels, **image},
            "video_preprocessor_config.json": {**pixels, **video, "fps": None, "use_token_compression": True},
        }
    return {}


def write_folder(
    folder: pathlib.Path,
    layout: str,
    config: ModelConfig,
    dtype: str = "bfloat16",
    shards: int = 1,
    seed: int = 0,
    extra: dict[str, np.ndarray] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    change: dict | None = None,
) -> dict[str, np.ndarray]:
    """Writes a checkpoint folder.

    Args:
      folder: Folder to create.
      layout: Layout of the checkpoint.
      config: Model configuration.
      dtype: Name of the dtype of random tensors and in config.json.
      shards: Number of safetensors files.
      seed: Seed of random tensors.
      extra: Additional tensors to store.
      tensors: Tensors of the model; random by default.
      change: Keys of config.json to replace.

    Returns:
      The tensors without `extra`.
    """
    folder.mkdir(parents=True)
    tensors = tensors if tensors is not None else random_tensors(layout, config, dtype, seed)
    stored = {**tensors, **(extra or {})}
    names = list(stored)
    if shards == 1:
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: stored[name] for name in names[number::shards]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config_json(layout, config, dtype) | (change or {}))
    if layout in ("official", "official-train", "native", "qwen2"):
        files = tokenizer_files(official=layout.startswith("official")) | processor_files(layout)
        for name, content in files.items():
            write_json(folder / name, content)
    return tensors


def write_json(path: pathlib.Path, content) -> None:
    path.write_text(json.dumps(content, indent=2))


def siglip_extras(config: ModelConfig, prefix: str = "vision_model.") -> dict[str, np.ndarray]:
    """Returns the tensors of a SigLIP that are not part of the tower."""
    width = config.vision.hidden_size
    names = ("embeddings.position_embedding.weight", "head.probe", "head.attention.in_proj_weight", "head.mlp.fc1.bias")
    extras = {prefix + name: np.ones((4, width), np.float32) for name in names}
    extras |= {f"text_model.{name}": np.ones(3, np.float32) for name in ("embeddings.x", "encoder.layers.0.y")}
    extras |= {"logit_scale": np.ones(1, np.float32), "logit_bias": np.ones(1, np.float32)}
    assert DROPPABLE["siglip"]
    return extras


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Asserts that names, shapes, dtypes and all bits are equal."""
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert actual[name].tobytes() == np.ascontiguousarray(tensor).tobytes(), name


def renamed(tensors: dict[str, np.ndarray], source: str, target: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the tensors of layout `source` under the names of layout `target`."""
    leaves, specs = name_map(target, config).leaves, name_map(source, config).tensors
    return {leaves[spec.leaf].tensor(spec.layer).name: tensors[name] for name, spec in specs.items()}
