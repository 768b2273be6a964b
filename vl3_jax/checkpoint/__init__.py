"""Reads and writes checkpoints as Orbax folders and as Hugging Face folders of every supported layout.

Tensors are streamed. Importing this package runs no device code and needs neither torch nor transformers. A module
imports modules of its own layer and of those above it:

  bytes     `tensors`          named tensors, fast copies
            `safetensors_file` safetensors files
            `torch_pickle`     PyTorch files, read without running their code
  meaning   `name_specs`       a tensor of a layout and the slice of a leaf that it fills
            `sam2_names`       those of SAM-2: a table
            `sa2va_names`      those of both, and of what joins them
            `names`            those of VideoLLaMA3: a table
            `sam2_hf_config`   config.json and `Sam2Config`
            `hf_config`        config.json and `ModelConfig`
            `sidecar_files`    the small files beside the weights, and how their keys map: a table
            `tokenizer_files`  special tokens and chat templates
            `sources`          a checkpoint of any kind as leaves of the parameter tree
            `orbax_tree`       Orbax folders as such a source, read with TensorStore
            `digests`          checksums of an Orbax folder
            `run_files`        the small files of a run, joined with those of its base
            `peft_config`      adapter_config.json
            `peft_merge`       adapters, merged while they are read
  actions   `hub`              download from the Hugging Face Hub
            `hf_source`        open a Hugging Face folder, URL or Hub id
            `opening`          open a checkpoint of any kind
            `loading`          load it onto devices
            `adapter_stacks`   load adapters beside it
            `init_source`      combine the initial checkpoint of stage 1
            `sa2va_init`       join a VideoLLaMA3 and a SAM-2
            `orbax_write`      write an Orbax folder
            `export`           write a Hugging Face folder
            `peft_export`      write the adapters of a run
            `inspection`       list the content of a checkpoint, and compare two
"""

import importlib
from typing import TYPE_CHECKING

from vl3_jax.checkpoint.export import write_hf
from vl3_jax.checkpoint.hf_source import open_hf
from vl3_jax.checkpoint.init_source import InitSource
from vl3_jax.checkpoint.names import LAYOUTS, name_map
from vl3_jax.checkpoint.opening import find_tree, open_source, open_tokenizer
from vl3_jax.checkpoint.orbax_write import write_model_info, write_orbax
from vl3_jax.checkpoint.run_files import export_run_files
from vl3_jax.checkpoint.sa2va_init import Sa2vaInitSource
from vl3_jax.checkpoint.sources import CheckpointSource, chat_config

if TYPE_CHECKING:
    from vl3_jax.checkpoint.inspection import checkpoint_overview, compare
    from vl3_jax.checkpoint.loading import Checkpoint, load
    from vl3_jax.checkpoint.peft_export import peft_base, write_adapters

# What needs jax, whose import takes as long as the conversion of some gigabytes, is imported on first use.
_LAZY = {
    "Checkpoint": "loading",
    "checkpoint_overview": "inspection",
    "compare": "inspection",
    "load": "loading",
    "peft_base": "peft_export",
    "write_adapters": "peft_export",
}

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "CheckpointSource",
    "InitSource",
    "Sa2vaInitSource",
    "chat_config",
    "checkpoint_overview",
    "compare",
    "export_run_files",
    "find_tree",
    "load",
    "name_map",
    "open_hf",
    "open_source",
    "open_tokenizer",
    "peft_base",
    "write_adapters",
    "write_hf",
    "write_model_info",
    "write_orbax",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
