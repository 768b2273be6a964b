"""The adapters of a training run, as a PEFT folder."""

import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vl3_jax.checkpoint import open_source
from vl3_jax.checkpoint.hf_config import read_json
from vl3_jax.checkpoint.orbax_tree import find_tree, nested
from vl3_jax.checkpoint.paths import list_dir, resolve
from vl3_jax.errors import InputError
from vl3_jax.model.linear import LoraKernel
from vl3_jax.training.checkpoints import LEARNED, TRAINING
from vl3_jax.training.groups import map_paths
from vl3_jax.training.lora_export import write_adapters
from vl3_jax.training.run_config import RECORD


def export_adapters(workdir: str | os.PathLike, target: str | os.PathLike) -> None:
    """Writes what the newest checkpoint of a LoRA run learned: adapters, and modules that were trained whole.

    Raises:
      InputError: not the workdir of a run with adapters; one line.
    """
    folder = resolve(workdir)
    if RECORD not in list_dir(folder):
        raise InputError(f"{workdir}: not the workdir of a training run (no {RECORD}); give that of a LoRA run")
    config = read_json(folder / RECORD)["config"]
    rank, alpha = config["lora"]["rank"], config["lora"]["alpha"]
    tree = find_tree(folder)
    if not rank or tree is None:
        raise InputError(f"{workdir}: a run without adapters; export it with --format native or official")
    learned = _restored(tree.parent / TRAINING)[LEARNED]
    adapted = {path.rsplit("/", 1)[0] for path in learned if path.endswith(("/kernel/a", "/kernel/b"))}
    leaves = {path: leaf for path, leaf in learned.items() if path.rsplit("/", 1)[0] not in adapted}
    for path in adapted:
        leaves[path] = LoraKernel(None, learned[f"{path}/a"], learned[f"{path}/b"], alpha / rank)
    params = nested(leaves)
    whole = map_paths(lambda path, _: not path.endswith(("/kernel/a", "/kernel/b")), params)
    write_adapters(target, params, open_source(workdir).config, base=config["init_from"], whole=whole)


def _restored(folder: epath.Path) -> dict:
    """The arrays of a folder in this host's memory, whatever mesh wrote them."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, restore_args=arguments)
