"""The reference implementation (transformers' `video_llama_3` on torch, CPU, float32) with weights that reveal errors.

Default initialisation hides errors: attention is nearly uniform, every bias is 0 and every norm 1. Here weights are
scaled up and all biases and norms are away from their neutral values, so that a wrong angle or a wrong mask changes the
result.
"""

import dataclasses

import numpy as np
import pytest

from vl3_jax.bench.reference import model_inputs, reference_config
from vl3_jax.bench.torchvision_ops import declare_operators
from vl3_jax.model import ModelConfig
from vl3_jax.processing.packed_batch import Sample

torch = pytest.importorskip("torch", reason="the reference is not installed: pip install -e '.[parity]'")
declare_operators()
from transformers import VideoLlama3ForConditionalGeneration  # noqa: E402

# Relative to 1/sqrt(fan in): for sharp attention, and for a tower MLP that contributes to the residual stream.
GAINS = {"q_proj": 1.5, "k_proj": 1.5, "fc2": 6.0}


def reference_model(config: ModelConfig, seed: int = 0) -> VideoLlama3ForConditionalGeneration:
    """Creates a model in evaluation mode in which every part of the computation affects the result."""
    torch.manual_seed(seed)
    model = VideoLlama3ForConditionalGeneration(reference_config(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                if name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0.0, 0.3)
            elif name.endswith("bias"):
                # Around -2 the two GELUs differ most relative to their values.
                parameter.normal_(-2.0 if ("fc1" in name or "readout.0" in name) else 0.0, 0.5)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, 1.0)
            else:
                gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
                parameter.normal_(0.0, gain * parameter[0].numel() ** -0.5)
    model.tie_weights()
    return model


@dataclasses.dataclass
class Stages:
    """Output of each stage: [patches, C] or [vision tokens, ...], images before videos; decoder [B, L, ...]."""

    patch_embed: np.ndarray | None
    tower: list[np.ndarray]
    merged: np.ndarray | None
    projected: np.ndarray | None
    decoder: list[np.ndarray]
    logits: np.ndarray


def run_stages(model: VideoLlama3ForConditionalGeneration, samples: list[Sample]) -> Stages:
    """Runs the reference and records every stage; the tower runs once for images and once for videos."""
    outputs: dict[str, list[np.ndarray]] = {}

    def record(name: str):
        def hook(_module, _inputs, output):
            tensor = output if isinstance(output, torch.Tensor) else output[0]
            outputs.setdefault(name, []).append(tensor.detach().numpy())

        return hook

    vision, language = model.model.vision_model, model.model.language_model
    named = [("patch_embed", vision.embeddings), ("merged", vision), ("projected", model.model.projector)]
    named += [(f"tower{i}", layer) for i, layer in enumerate(vision.encoder.layers)]
    named += [(f"decoder{i}", layer) for i, layer in enumerate(language.layers)]
    handles = [module.register_forward_hook(record(name)) for name, module in named]
    with torch.no_grad():
        logits = model(**model_inputs(samples), use_cache=False).logits.numpy()
    for handle in handles:
        handle.remove()

    def concatenated(name: str) -> np.ndarray | None:
        return np.concatenate(outputs[name]) if name in outputs else None

    has_vision = "tower0" in outputs
    return Stages(
        patch_embed=concatenated("patch_embed"),
        tower=[concatenated(f"tower{i}") for i in range(len(vision.encoder.layers))] if has_vision else [],
        merged=concatenated("merged"),
        projected=concatenated("projected"),
        decoder=[outputs[f"decoder{i}"][0] for i in range(len(language.layers))],
        logits=logits,
    )
