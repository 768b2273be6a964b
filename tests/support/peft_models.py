"""Models for PEFT: the reference under the names of either layout, and random values for what an adapter trains.

Tests import this module with `pytest.importorskip`.
"""

from support.reference import IMAGE_ID, VIDEO_ID, reference_model, tensors  # prepares the import of transformers

# isort: split
import copy
import pathlib
from typing import Any

import numpy as np
import peft
import torch
from safetensors.numpy import save_file

from support.hf_folders import config_json, processor_files, renamed, tokenizer_files, write_json
from vl3_jax.model import ModelConfig


class OfficialModel(torch.nn.Module):
    """The reference with the module names of the official code."""

    def __init__(self, native: torch.nn.Module):
        super().__init__()
        self.model = torch.nn.Module()
        language = native.model.language_model
        self.model.embed_tokens, self.model.layers, self.model.norm = (
            language.embed_tokens,
            language.layers,
            language.norm,
        )
        self.model.vision_encoder, self.model.mm_projector = native.model.vision_model, native.model.projector
        self.lm_head = native.lm_head
        self._native = [native]  # a list, so that torch does not see its modules twice
        self.config, self.prepare_inputs_for_generation = native.config, None  # PEFT looks for them

    def forward(self, **inputs: Any) -> Any:
        native = self._native[0]
        language = native.model.language_model
        language.embed_tokens, language.norm, native.lm_head = self.model.embed_tokens, self.model.norm, self.lm_head
        native.model.vision_model, native.model.projector = self.model.vision_encoder, self.model.mm_projector
        return native(**inputs)


def write_base(folder: pathlib.Path, layout: str, config: ModelConfig) -> torch.nn.Module:
    """Writes the reference as a checkpoint folder, and returns it under the names of that layout."""
    model = reference_model(config)
    native = tensors(model)
    folder.mkdir()
    stored = renamed(native, "native", layout, config)
    save_file({name: np.ascontiguousarray(array) for name, array in stored.items()}, folder / "model.safetensors")
    files = tokenizer_files(layout != "native") | processor_files(layout)
    content = config_json(layout, config, "float32")
    if layout == "native":
        content |= {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID}
    for name, value in (files | {"config.json": content}).items():
        write_json(folder / name, value)
    return model if layout == "native" else OfficialModel(model)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives random values to everything that training an adapter changes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def save_adapter(model: torch.nn.Module, folder: pathlib.Path, config: peft.PeftConfig, **options: Any) -> None:
    """Trains an adapter on a copy of the model, so to speak, and saves it."""
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    randomise(adapted)
    adapted.save_pretrained(folder, **options)


def merged(model: torch.nn.Module, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a copy of the model after PEFT loaded an adapter and merged it."""
    result = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    return {name: value.numpy() for name, value in result.state_dict().items()}
