"""The reference side of the benchmarks: transformers' `video_llama_3` on torch, if they are installed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from vl3_jax.bench.torchvision_ops import declare_operators
from vl3_jax.checkpoint.names import name_map
from vl3_jax.model.config import ModelConfig
from vl3_jax.processing.packed_batch import Sample, Visual

SIDE = "transformers"
IMAGE_ID, VIDEO_ID = 500, 501  # placeholders, inside the smallest vocabulary


def why_missing() -> str | None:
    """Returns one line that says why the reference cannot be imported, or None if it can."""
    try:
        import torch  # noqa: F401

        declare_operators()
        from transformers import VideoLlama3ForConditionalGeneration  # noqa: F401
    except Exception as error:  # incompatible versions of torch and torchvision raise exceptions of any type
        return f"without {SIDE}: {' '.join(str(error).split())[:120]}"
    return None


def reference_config(config: ModelConfig) -> Any:
    """Converts a model configuration to a `VideoLlama3Config`."""
    declare_operators()
    from transformers import VideoLlama3Config

    vision, text = config.vision, config.text
    return VideoLlama3Config(
        vision_config={
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "patch_size": vision.patch_size,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "vocab_size": text.vocab_size,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
            "tie_word_embeddings": text.tie_word_embeddings,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        tie_word_embeddings=text.tie_word_embeddings,
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
    )


def reference_model(config: ModelConfig, dtype: str = "float32") -> Any:
    """Initialises the reference with random weights and sdpa attention.

    The model is on the GPU if JAX uses one and torch can, else on the CPU.

    Args:
      config: The configuration of our model.
      dtype: Type of weights and activations.
    """
    import jax
    import torch

    hf_config = reference_config(config)
    from transformers import VideoLlama3ForConditionalGeneration

    torch.manual_seed(0)
    model = VideoLlama3ForConditionalGeneration(hf_config).eval().to(getattr(torch, dtype))
    return model.cuda() if jax.default_backend() == "gpu" and torch.cuda.is_available() else model


def tensors(model: Any) -> dict[str, np.ndarray]:
    """Returns the state dict as `save_pretrained` writes it, in float32 and with tied tensors once."""
    state = {name: value.float().cpu().numpy() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def native_params(tensors: dict[str, np.ndarray], config: ModelConfig) -> dict:
    """Converts a transformers state dict to our parameter tree; uses every tensor and fills every leaf."""
    names = name_map("native", config)
    assert set(tensors) == set(names.tensors), set(tensors) ^ set(names.tensors)
    leaves = {}
    for path, leaf in names.leaves.items():
        slices = [spec.to_leaf(tensors[spec.name]) for spec in leaf.tensors]
        leaves[path] = np.stack(slices) if leaf.stacked else slices[0]
    return unflatten_dict(leaves, sep="/")


def normalise(patches: np.ndarray) -> np.ndarray:
    """Normalises uint8 pixels to float32 in -1..1 with the rounding of the reference's processor."""
    return ((patches.astype(np.float32) * np.float32(1 / 255)) - np.float32(0.5)) / np.float32(0.5)


def model_inputs(samples: Sequence[Sample]) -> dict[str, Any]:
    """Converts samples to keyword arguments of the reference: torch tensors, one sample a row, padded on the right."""
    import torch

    length = max(len(sample.tokens) for sample in samples)
    ids = np.zeros((len(samples), length), np.int64)
    mask = np.zeros((len(samples), length), np.int64)
    images, videos = [], []
    for row, sample in enumerate(samples):
        tokens = sample.tokens.astype(np.int64)
        placeholders = [np.full(v.num_tokens, VIDEO_ID if is_video(v) else IMAGE_ID) for v in sample.visuals]
        if placeholders:
            tokens[sample.is_vision] = np.concatenate(placeholders)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        for visual in sample.visuals:
            (videos if is_video(visual) else images).append(visual)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    for visuals, pixels, prefix in ((images, "pixel_values", "image"), (videos, "pixel_values_videos", "video")):
        if visuals:
            inputs[pixels] = torch.tensor(np.concatenate([normalise(v.patches) for v in visuals]))
            inputs[f"{prefix}_grid_thw"] = torch.tensor([v.grid for v in visuals])
            inputs[f"{prefix}_merge_sizes"] = torch.tensor([v.merge for v in visuals])
    if videos:
        inputs["video_compression_mask"] = torch.tensor(np.concatenate([v.keep for v in videos]))
    return inputs


def is_video(visual: Visual) -> bool:
    """Whether a visual has more than one frame."""
    return visual.grid[0] > 1


def synchronised(model: Any, function: Callable[[], Any]) -> Callable[[], Any]:
    """Wraps `function` to run without gradients and to wait for the model's device."""
    import torch

    def run() -> Any:
        with torch.inference_mode():
            result = function()
        synchronise(model)
        return result

    return run


def synchronise(model: Any) -> None:
    """Waits until the model's device is idle."""
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize()
