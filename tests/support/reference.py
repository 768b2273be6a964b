"""The reference implementation: transformers' `video_llama_3` on torch, with weights that reveal errors.

Default initialisation hides errors: attention is nearly uniform, every bias is 0 and every norm 1. Here weights are
scaled up and all biases and norms are away from their neutral values, so that a wrong angle or a wrong mask changes the
result.

Tests import this module with `pytest.importorskip`; `vl3 bench` in a checkout loads the file for its comparisons.

torchvision's wheels are compiled against CUDA builds of torch. Beside a CPU build their library does not load, and the
import then fails at operators that are not declared. The reference's processors use only the transforms, which need
none of these operators: declaring their names is enough.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from flax.traverse_util import unflatten_dict

from vl3_jax.checkpoint.names import name_map
from vl3_jax.model import ModelConfig
from vl3_jax.processing.packed_batch import PATCH_DIM, Sample, Visual
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.resize import PATCH

IMAGE_ID, VIDEO_ID = 500, 501  # placeholders, inside the smallest vocabulary
# Relative to 1/sqrt(fan in): for sharp attention, and for a tower MLP that contributes to the residual stream.
GAINS = {"q_proj": 1.5, "k_proj": 1.5, "fc2": 6.0}
MIN_FRAMES = 4
_DECLARATIONS = "_meta_registrations.py"
_OPERATOR_NAME = re.compile(r'"torchvision::(\w+)"|register_meta\("(\w+)"')


def declare_operators() -> None:
    """Declares torchvision's operators if its library cannot; does nothing without torchvision or with CUDA."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or torch.version.cuda is not None:
        return
    source = (pathlib.Path(spec.origin).parent / _DECLARATIONS).read_text()
    names = {first or second for first, second in _OPERATOR_NAME.findall(source)}
    for name in sorted(names):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor a) -> Tensor")


declare_operators()
from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration  # noqa: E402


def reference_config(config: ModelConfig) -> VideoLlama3Config:
    """Converts a model configuration to a `VideoLlama3Config`."""
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


def reference_model(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> VideoLlama3ForConditionalGeneration:
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
    return model.to(getattr(torch, dtype))


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


def media_processing(config: ProcessorConfig) -> Callable[[pathlib.Path, bool], tuple[int, int]]:
    """Builds the reference's processing of one file, with the frame rate, budget and merge sizes of `config`.

    Returns:
      A function of a path and whether it is a video, which returns the numbers of frames and of vision tokens.

    Raises:
      ImportError: torchvision is not installed.
    """
    from PIL import Image
    from transformers.models.video_llama_3.image_processing_video_llama_3 import VideoLlama3ImageProcessor
    from transformers.models.video_llama_3.video_processing_video_llama_3 import VideoLlama3VideoProcessor
    from transformers.video_utils import load_video

    def arguments(merge: int) -> dict[str, Any]:
        """The limits are on the pixels of an image, or of all frames of a video."""
        limits = {"shortest_edge": config.min_tokens, "longest_edge": config.max_tokens}
        size = {name: tokens * (merge * PATCH) ** 2 for name, tokens in limits.items()}
        return {"size": size, "merge_size": merge, "image_mean": config.image_mean, "image_std": config.image_std}

    process_image = VideoLlama3ImageProcessor(**arguments(config.image_merge))
    limits = {"max_frames": config.max_frames, "min_frames": MIN_FRAMES, "use_token_compression": True}
    process_video = VideoLlama3VideoProcessor(**arguments(config.video_merge), **limits)
    sample_indices = functools.partial(process_video.sample_frames, fps=config.fps)

    def run(path: pathlib.Path, is_video: bool) -> tuple[int, int]:
        if not is_video:
            inputs = process_image(Image.open(path), return_tensors="pt")
            return 1, int(inputs["image_grid_thw"][0].prod()) // config.image_merge**2
        frames, metadata = load_video(str(path), backend="pyav", sample_indices_fn=sample_indices)
        inputs = process_video([frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
        return int(inputs["video_grid_thw"][0, 0]), int(inputs["video_compression_mask"].sum())

    return run


def compression_mask(pixels: np.ndarray, merge: int) -> np.ndarray:
    """Computes the pruning mask [frames * blocks] of normalised blocks [frames, blocks, merge^2 * 588]."""
    from transformers.models.video_llama_3.video_processing_video_llama_3 import VideoLlama3VideoProcessor

    frames, blocks, _ = pixels.shape
    grid = torch.tensor([[frames, merge * blocks, merge]])
    flat = torch.tensor(pixels.reshape(-1, PATCH_DIM))
    return VideoLlama3VideoProcessor._get_compression_mask(None, flat, grid, torch.tensor([merge])).numpy()


class _TokenClock:
    """A streamer for transformers' `generate` that records when each token arrives on the host, the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class ReferenceSides:
    """The sides of `vl3 bench` that run the model, which is on the GPU if JAX uses one and torch can.

    Attributes:
      model: The reference.
    """

    def __init__(self, config: ModelConfig, dtype: str):
        self._config, model = config, reference_model(config, dtype=dtype)
        self.model = model.cuda() if jax.default_backend() == "gpu" and torch.cuda.is_available() else model

    def params(self) -> dict:
        """Returns the weights as our parameter tree, float32."""
        return native_params(tensors(self.model), self._config)

    def tower(self, patches: np.ndarray, grid: tuple[int, int, int]) -> Callable[[], Any]:
        """Runs the tower over the uint8 `patches` of `grid` (frames, rows, columns)."""
        model = self.model.model.vision_model
        inputs = {
            "pixel_values": torch.tensor(normalise(patches)).to(model.device, model.dtype),
            "grid_thw": torch.tensor([grid]).to(model.device),
            "merge_sizes": torch.tensor([1]).to(model.device),
        }
        return self._waiting(lambda: model(**inputs))

    def decoder(self, token_ids: np.ndarray) -> Callable[[], Any]:
        """Runs the decoder without unembedding over `token_ids` [B, L]."""
        ids = torch.tensor(token_ids).to(self.model.device)
        return self._waiting(lambda: self.model.model.language_model(input_ids=ids, use_cache=False))

    def loss(self, samples: list[Sample]) -> torch.Tensor:
        """Returns the mean loss; vision tokens are not supervised."""
        return self._loss(self._inputs(samples))

    def step(self, samples: list[Sample], recompute: bool) -> Callable[[], None]:
        """Runs forward and backward; `recompute` recomputes activations."""
        inputs = self._inputs(samples)

        def run() -> None:
            self.model.train()
            if recompute:
                self.model.gradient_checkpointing_enable()
            self.model.zero_grad(set_to_none=True)
            self._loss(inputs).backward()
            self.model.zero_grad(set_to_none=True)
            self.model.eval()
            self._wait()

        return run

    def generate(self, samples: list[Sample], new: int) -> Callable[[], tuple[float, float]]:
        """Generates `new` tokens for each sample; returns the seconds up to the first token and those of the others."""
        inputs = self._inputs(samples)

        def run() -> tuple[float, float]:
            clock = _TokenClock()
            start = time.perf_counter()
            self.model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=clock)
            _, first, *others = clock.times
            return first - start, others[-1] - first

        return run

    def _inputs(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.model.device) for name, value in model_inputs(samples).items()}

    def _loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_ID, -100)
        return self.model(**inputs, labels=labels, use_cache=False).loss

    def _waiting(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Wraps `function` to run without gradients and to wait for the model's device."""

        def run() -> Any:
            with torch.inference_mode():
                result = function()
            self._wait()
            return result

        return run

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
