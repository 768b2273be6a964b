"""Checkpoints of a run, written asynchronously every so many steps.

    WORKDIR/checkpoints/<step>/params       the model, as every command reads it (adapters merged)
    WORKDIR/checkpoints/<step>/training     what only resuming needs: moments, step, unmerged adapters
    WORKDIR/checkpoints/<step>/data         state of the data, JSON

The folder of a step gets its name when it is complete, so whenever a job is killed, the last complete one is there. The
adapters of a checkpoint are exported as a PEFT folder.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict

from vl3_jax.checkpoint import export_run_files, find_tree, open_source, peft_base, write_adapters
from vl3_jax.checkpoint.peft_merge import ADAPTER_WEIGHTS
from vl3_jax.checkpoint.sidecar_files import ADAPTER_CONFIG
from vl3_jax.checkpoint.sources import Origin
from vl3_jax.errors import InputError
from vl3_jax.model.linear import LoraKernel
from vl3_jax.storage.jobs import open_job
from vl3_jax.storage.paths import is_url, translate_io_errors
from vl3_jax.training.checksums import checksums
from vl3_jax.training.groups import flatten, map_paths, split
from vl3_jax.training.init import read_record
from vl3_jax.training.lora import merge_adapters
from vl3_jax.training.optimizer import Optimizer
from vl3_jax.training.run_config import CheckpointConfig
from vl3_jax.training.state import TrainState

FOLDER = "checkpoints"
_PARAMS, _TRAINING, _DATA = "params", "training", "data"
# In `training` of a run with adapters: the trainable parameters by path, and checksums of the others.
_TRAINED, _FROZEN = "trained", "frozen"


class Checkpoints:
    """The checkpoints of one workdir, local or gs://.

    Args:
      workdir: Workdir of the run.
      optimizer: Optimizer of the run, which knows the trainable parameters.
      config: How often to save and how many checkpoints to keep.
      has_adapters: Whether the parameters have adapters. Their base is not saved: resuming takes it from the initial
        weights of the run.

    Raises:
      InputError: A gs:// bucket that may not be read; one line.
    """

    def __init__(self, workdir: epath.Path, optimizer: Optimizer, config: CheckpointConfig, has_adapters: bool):
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep or None, enable_async_checkpointing=True)
        items = (_PARAMS, _TRAINING, _DATA)
        with translate_io_errors(workdir):
            self._manager = ocp.CheckpointManager(workdir / FOLDER, options=options, item_names=items)
        self._workdir, self._optimizer, self._every, self._has_adapters = workdir, optimizer, config.every, has_adapters

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def is_due(self, step: int) -> bool:
        """Returns whether to save a checkpoint after `step` steps."""
        return self._every > 0 and step % self._every == 0

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Starts to write a checkpoint, unless there is one of this step; returns when the arrays are copied."""
        if self.latest == step:
            return
        params = jax.jit(merge_adapters)(state.params) if self._has_adapters else state.params
        items = {
            _PARAMS: ocp.args.StandardSave(params, _one_layer_per_chunk(params)),
            _TRAINING: ocp.args.StandardSave(self._training(state)),
            _DATA: ocp.args.JsonSave(data_state),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def data_state(self, step: int) -> dict[str, Any]:
        """Returns the state of the data after `step` steps."""
        return self._manager.restore(step, args=ocp.args.Composite(**{_DATA: ocp.args.JsonRestore()}))[_DATA]

    def restore(self, step: int, target: TrainState, base: TrainState | None = None) -> TrainState:
        """Returns the state after `step` steps.

        Args:
          step: Step of the checkpoint.
          target: Shapes and shardings of the state; the mesh may be another than the one that saved.
          base: State at step 0 of a run with adapters; None of other runs.

        Raises:
          InputError: The frozen weights of `base` are not those that the run began from.
        """
        wanted = {_TRAINING: ocp.args.StandardRestore(self._training(target))}
        if base is None:
            wanted[_PARAMS] = ocp.args.StandardRestore(target.params)
        restored = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        training = restored[_TRAINING]
        if base is not None:
            self._check_base(base, training[_FROZEN])
        params = restored[_PARAMS] if base is None else map_paths(training[_TRAINED].get, base.params)
        return TrainState(training["step"], params, training["opt_state"])

    def wait(self) -> None:
        """Waits until everything that was started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes and ends the writing threads."""
        self._manager.close()

    def _training(self, state: TrainState) -> dict[str, Any]:
        kept = {"step": state.step, "opt_state": state.opt_state}
        if self._has_adapters:
            trained, frozen = split(state.params, self._optimizer.mask)
            kept |= {_TRAINED: flatten(trained), _FROZEN: self._checksums(frozen, state.step.sharding)}
        return kept

    def _checksums(self, frozen: Any, sharding: jax.sharding.Sharding) -> jax.Array | jax.ShapeDtypeStruct:
        """Returns the checksums of the frozen weights, or the shape of them where those are shapes."""
        leaves = jax.tree.leaves(frozen)
        if not all(isinstance(leaf, jax.Array) for leaf in leaves):
            return jax.ShapeDtypeStruct((len(leaves),), jnp.uint32, sharding=sharding)
        return jax.jit(checksums, out_shardings=sharding)(leaves)

    def _check_base(self, base: TrainState, stored: jax.Array) -> None:
        """Raises InputError unless the frozen weights of a run are still those that it began from."""
        frozen = split(base.params, self._optimizer.mask)[1]
        changed = np.asarray(self._checksums(frozen, base.step.sharding)) != np.asarray(stored)
        if changed.any():
            first = [*flatten(frozen)][int(changed.argmax())]
            raise InputError(
                f"{self._workdir}: init_from has other weights now than its run began from ({first} and "
                f"{int(changed.sum()) - 1} more); give the run its start back, or start another --workdir"
            )


def _one_layer_per_chunk(params: Any) -> Any:
    """Returns how Orbax stores parameters: one layer per chunk, so that a layer can be read without the others."""
    return map_paths(lambda path, _: ocp.SaveArgs(shard_axes=(0,) if "layers" in path.split("/") else ()), params)


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
    record, tree = read_record(workdir), find_tree(workdir)
    lora = record.section("config").section("lora")
    rank, alpha = lora.integer("rank", 0), lora.number("alpha", 0.0)
    if not rank:
        raise InputError(f"{workdir}: a run without adapters; export it with --format native or official")
    if tree is None:
        raise InputError(f"{workdir}: a run without a checkpoint yet; export it after its first")
    run = open_source(workdir)
    named = peft_base(os.fspath(workdir), run.config, base, layout, Origin.parse(record.get("origin")))
    fingerprint = run.fingerprint(to="peft", base=named.name, layout=named.layout, dtype=str(dtype))
    files = export_run_files(run, named.layout)
    with open_job(target, fingerprint, {ADAPTER_CONFIG, ADAPTER_WEIGHTS, *files}) as job:
        if job.finished:
            return
        leaves = _trained_leaves(tree.parent / _TRAINING)
        empty, scale = jnp.empty(0), alpha / rank  # the base is not written
        for kernel in [path.removesuffix("/a") for path in leaves if path.endswith("/kernel/a")]:
            leaves[kernel] = LoraKernel(empty, leaves.pop(f"{kernel}/a"), leaves.pop(f"{kernel}/b"), scale)
        whole = unflatten_dict(dict.fromkeys(leaves, True), sep="/")
        params = unflatten_dict(leaves, sep="/")
        write_adapters(job.folder, params, run.config, base=named.name, layout=named.layout, whole=whole, dtype=dtype)
        for name, content in files.items():
            (job.folder / name).write_bytes(content)
        job.commit()


def _trained_leaves(folder: epath.Path) -> dict[str, Any]:
    """Reads the trainable parameters of a checkpoint into this host's memory, whatever mesh wrote them."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        return checkpointer.restore(folder, restore_args=arguments)[_TRAINED]
