"""The adapters of a run as a PEFT folder."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict

from vl3_jax.checkpoint import chat_config, export_run_files, open_source, peft_base, write_adapters
from vl3_jax.checkpoint.peft_merge import ADAPTER_WEIGHTS
from vl3_jax.checkpoint.sidecar_files import ADAPTER_CONFIG
from vl3_jax.checkpoint.sources import Origin
from vl3_jax.checkpoint.step_folders import step_damage, steps_in
from vl3_jax.errors import InputError
from vl3_jax.model.linear import LoraKernel
from vl3_jax.storage.jobs import open_job
from vl3_jax.storage.paths import is_url, resolve
from vl3_jax.training.checkpoints import FOLDER, PARAMS, TRAINED, TRAINING
from vl3_jax.training.init import read_record


def export_adapters(
    workdir: str | os.PathLike,
    target: str | os.PathLike,
    layout: str | None = None,
    base: str | None = None,
    dtype: np.dtype | None = None,
) -> None:
    """Writes the adapters of the newest checkpoint of a LoRA run, and the modules that were trained whole.

    Args:
      workdir: Workdir of the run, local or gs://.
      target: PEFT folder to write, local and new.
      layout: Naming of the tensors, "official", "official-train" or "native"; by default that of the base.
      base: Folder or Hub id of the base; by default the Hugging Face model that the run began from.
      dtype: Type to store; by default as trained.

    Raises:
      InputError: Not the workdir of a run with adapters, or no base that PEFT could load; one line.
    """
    if is_url(target):
        raise InputError(f"{target}: exports go to local folders; choose one and copy it to the bucket")
    record, step = read_record(workdir), _newest_step(workdir)
    lora = record.section("config").section("lora")
    rank, alpha = lora.integer("rank", 0), lora.number("alpha", 0.0)
    if not rank:
        raise InputError(f"{workdir}: a run without adapters; export it with --format native or official")
    if step is None:
        raise InputError(f"{workdir}: a run without a checkpoint yet; export it after its first")
    run = open_source(workdir)
    config = chat_config(run)
    named = peft_base(os.fspath(workdir), config, base, layout, Origin.parse(record.get("origin")))
    fingerprint = run.fingerprint(to="peft", base=named.name, layout=named.layout, dtype=str(dtype))
    files = export_run_files(run, named.layout)
    with open_job(target, fingerprint, {ADAPTER_CONFIG, ADAPTER_WEIGHTS, *files}) as job:
        if job.finished:
            return
        leaves = _trained_leaves(step / TRAINING)
        empty, scale = jnp.empty(0), alpha / rank  # the base is not written
        for kernel in [path.removesuffix("/a") for path in leaves if path.endswith("/kernel/a")]:
            leaves[kernel] = LoraKernel(empty, leaves.pop(f"{kernel}/a"), leaves.pop(f"{kernel}/b"), scale)
        whole = unflatten_dict(dict.fromkeys(leaves, True), sep="/")
        params = unflatten_dict(leaves, sep="/")
        write_adapters(job.folder, params, config, base=named.name, layout=named.layout, whole=whole, dtype=dtype)
        for name, content in files.items():
            (job.folder / name).write_bytes(content)
        job.commit()


def _newest_step(workdir: str | os.PathLike) -> epath.Path | None:
    """Returns the folder of the newest step that is not damaged; None if there are no steps."""
    steps = steps_in(resolve(workdir) / FOLDER)
    whole = (step for step in steps if not step_damage(step, (PARAMS, TRAINING), ()))
    return next(whole, steps[0] if steps else None)


def _trained_leaves(folder: epath.Path) -> dict[str, Any]:
    """Reads the trainable parameters of a checkpoint into this host's memory, whatever mesh wrote them."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        return checkpointer.restore(folder, restore_args=arguments)[TRAINED]
