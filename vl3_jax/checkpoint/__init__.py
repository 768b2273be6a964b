"""Reads and writes checkpoints as Orbax folders and as Hugging Face folders of every supported layout.

Tensors are streamed. Importing this package runs no device code and needs neither torch nor transformers.
"""

from vl3_jax.checkpoint.export import write_hf
from vl3_jax.checkpoint.hf_config import parse_config
from vl3_jax.checkpoint.hf_source import open_hf
from vl3_jax.checkpoint.init_source import InitSource
from vl3_jax.checkpoint.load import Checkpoint, load, load_source, open_source
from vl3_jax.checkpoint.names import LAYOUTS, TABLE, LeafSpec, NameMap, TensorSpec, name_map
from vl3_jax.checkpoint.orbax_tree import OrbaxSource, find_tree
from vl3_jax.checkpoint.orbax_write import write_model_info, write_orbax
from vl3_jax.checkpoint.overview import checkpoint_overview
from vl3_jax.checkpoint.sources import CheckpointSource, TensorSource
from vl3_jax.checkpoint.verify import Comparison, compare

__all__ = [
    "LAYOUTS",
    "TABLE",
    "Checkpoint",
    "CheckpointSource",
    "Comparison",
    "InitSource",
    "LeafSpec",
    "NameMap",
    "OrbaxSource",
    "TensorSource",
    "TensorSpec",
    "checkpoint_overview",
    "compare",
    "find_tree",
    "load",
    "load_source",
    "name_map",
    "open_hf",
    "open_source",
    "parse_config",
    "write_hf",
    "write_model_info",
    "write_orbax",
]
