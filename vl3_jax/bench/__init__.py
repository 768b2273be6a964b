"""What `vl3 bench` measures. Each subject is a module with one function, `measure(settings) -> Table`."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vl3_jax.bench.settings import Settings
    from vl3_jax.bench.table import Table

# Name on the command line, what it measures. The module is `vl3_jax.bench.bench_<name>`.
SUBJECTS = {
    "packing": "attention and tower over packed rows beside the same code that skips nothing",
    "tower": "the vision tower, by size of pack and of frame",
    "prefill": "the decoder over one long sample and over many short ones",
    "loss": "chunked cross-entropy beside plain logits",
    "step": "forward and backward of the whole model over a packed row",
    "decode": "generation, and its share of the memory's bandwidth",
    "cache": "attention to a cache, by slots in use, beside dense attention to all of it",
    "processor": "pictures and videos to packed patches",
    "packer": "planning rows",
    "pruning": "the frame pruner's mask",
}
GROUPS = {"gpu": ("step", "decode")}


def measure(name: str, settings: "Settings") -> "Table":
    """The table of one subject."""
    return importlib.import_module(f"vl3_jax.bench.bench_{name}").measure(settings)
