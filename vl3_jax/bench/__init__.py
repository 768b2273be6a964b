"""The benchmarks of `vl3 bench`. Each subject is a module with one function, `measure(settings) -> Table`."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vl3_jax.bench.settings import Settings
    from vl3_jax.bench.table import Table

# Name on the command line: what it measures. The module is `vl3_jax.bench.bench_<name>`.
SUBJECTS = {
    "packing": "attention and tower over packed rows, against the same code without block skipping",
    "tower": "the vision tower, by number of patches in a row and in a frame",
    "prefill": "the decoder over one long sample and over many short ones",
    "loss": "chunked cross-entropy, against plain logits",
    "step": "forward and backward of the whole model over a packed row",
    "decode": "generation, and the memory bandwidth that it uses",
    "released": "decoding at a released size, in float32 and int8",
    "cache": "attention to a cache, by slots in use, against dense attention to all slots",
    "processor": "images and videos to packed patches",
    "packer": "planning of packed rows",
    "pruning": "the frame pruner's mask",
    "loader": "images and videos with questions to packed rows",
    "conversion": "checkpoints in other layouts, against a plain copy",
}
ROUNDS = 5  # measurements of each side
GPU = "gpu"  # not a subject, but the script of the package `vl3_jax.bench.gpu`


def measure(name: str, settings: "Settings") -> "Table":
    """Measures one subject."""
    return importlib.import_module(f"vl3_jax.bench.bench_{name}").measure(settings)
