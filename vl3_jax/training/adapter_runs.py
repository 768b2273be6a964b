"""Export of the adapters of a training run as a PEFT folder."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict

from vl3_jax.checkpoint import find_tree, open_source, write_adapters
from vl3_jax.errors import InputError
from vl3_jax.model.linear import LoraKernel
from vl3_jax.storage.paths import list_dir, read_json, resolve
from vl3_jax.training.checkpoints import TRAINED, TRAINING
from vl3_jax.training.groups import map_paths
from vl3_jax.training.run_config import RUN_CONFIG_FILE


def export_adapters(workdir: str | os.PathLike, target: str | os.PathLike) -> None:
    """Writes the adapters of the newest checkpoint of a LoRA run, and the modules that were trained whole.

    Args:
      workdir: Workdir of the run, local or gs://.
      target: Folder to write.

    Raises:
      InputError: Not the workdir of a run with adapters; one line.
    """
    folder = resolve(workdir)
    if RUN_CONFIG_FILE not in list_dir(folder):
        raise InputError(
            f"{workdir}: not the workdir of a training run (no {RUN_CONFIG_FILE}); give that of a LoRA run"
        )
    config = read_json(folder / RUN_CONFIG_FILE)["config"]
    rank, alpha = config["lora"]["rank"], config["lora"]["alpha"]
    tree = find_tree(folder)
    if not rank or tree is None:
        raise InputError(f"{workdir}: a run without adapters; export it with --format native or official")
    trained = _restored(tree.parent / TRAINING)[TRAINED]
    adapted = {path.rsplit("/", 1)[0] for path in trained if path.endswith(("/kernel/a", "/kernel/b"))}
    leaves = {path: leaf for path, leaf in trained.items() if path.rsplit("/", 1)[0] not in adapted}
    no_base = jnp.empty(0)  # not written
    for path in adapted:
        leaves[path] = LoraKernel(no_base, trained[f"{path}/a"], trained[f"{path}/b"], alpha / rank)
    params = unflatten_dict(leaves, sep="/")
    whole = map_paths(lambda path, _: not path.endswith(("/kernel/a", "/kernel/b")), params)
    write_adapters(target, params, open_source(workdir).config, base=config["init_from"], whole=whole)


def _restored(folder: epath.Path) -> dict:
    """Reads the arrays of a folder into this host's memory, whatever mesh wrote them."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, restore_args=arguments)
