"""Checkpoints of a run, written asynchronously every so many steps.

    WORKDIR/checkpoints/<step>/params       the model, as every command reads it (adapters merged)
    WORKDIR/checkpoints/<step>/training     what only resuming needs: moments, step, unmerged adapters
    WORKDIR/checkpoints/<step>/data         state of the data, JSON
    WORKDIR/checkpoints/<step>/digests      checksum of each array that resuming reads, JSON; only where asked for
    WORKDIR/checkpoints/<step>.damaged      a checkpoint that could not be read; nothing reads it again

The folder of a step gets its name when it is complete, so whenever a job is killed, the last complete one is there. The
adapters of a checkpoint are exported as a PEFT folder.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vl3_jax.checkpoint.step_folders import put_aside, step_damage, steps_in
from vl3_jax.errors import InputError, printable
from vl3_jax.storage.disk_space import check_space, translate_write_errors
from vl3_jax.storage.durable import flush_tree
from vl3_jax.storage.paths import is_unreachable, is_url, list_dir, translate_io_errors
from vl3_jax.storage.progress import human_bytes
from vl3_jax.training.all_hosts import agreed, from_first_host, run_on_all_hosts
from vl3_jax.training.checksums import checksums
from vl3_jax.training.groups import flatten, map_paths, split
from vl3_jax.training.lora import merge_adapters
from vl3_jax.training.optimizer import Optimizer
from vl3_jax.training.orbax_use import own_checkpointer
from vl3_jax.training.run_config import CheckpointConfig
from vl3_jax.training.state import TrainState

FOLDER = "checkpoints"
PARAMS, TRAINING, _DATA, _DIGESTS = "params", "training", "data", "digests"
_TREES, _OBJECTS = (PARAMS, TRAINING), (_DATA,)
# In `training` of a run with adapters: the trainable parameters by path, and checksums of the others.
TRAINED, _FROZEN = "trained", "frozen"
_NONE = -1  # in place of a step
_UNFINISHED = "*.orbax-checkpoint-tmp*"  # folders of steps that are being written

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What a run goes on from.

    Attributes:
      step: Number of steps done.
      state: State of the training after them.
      data_state: State of the data after them.
    """

    step: int
    state: TrainState
    data_state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one workdir, local or gs://; every method is called by all processes alike.

    Args:
      workdir: Workdir of the run.
      optimizer: Optimizer of the run, which knows the trainable parameters.
      config: How often to save and how many checkpoints to keep.
      has_adapters: Whether the parameters have adapters. Their base is not saved: resuming takes it from the initial
        weights of the run.
    """

    def __init__(self, workdir: epath.Path, optimizer: Optimizer, config: CheckpointConfig, has_adapters: bool):
        self._folder, self._config = workdir / FOLDER, config
        self._workdir, self._optimizer, self._has_adapters = workdir, optimizer, has_adapters

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Writes and deletes steps. It lists the folder when it is made, so damaged steps are put aside before."""
        flush = ocp.AsyncOptions(post_finalization_callback=self._flush)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.keep or None,
            enable_async_checkpointing=True,
            async_options=flush,
            cleanup_tmp_directories=is_url(self._folder),  # of killed jobs; `check_space` removes local ones
        )
        items = (PARAMS, TRAINING, _DATA, _DIGESTS)
        with translate_io_errors(self._folder):
            return ocp.CheckpointManager(self._folder, options=options, item_names=items)

    def latest(self) -> int:
        """Returns the step of the newest checkpoint that is whole, as far as its files show; 0 if there is none.

        Raises:
          InputError: There are only damaged ones, or the folder cannot be read.
        """
        step, damages = self._newest_whole(None)
        if step == _NONE:
            self._require_no_damage(damages)
        return max(step, 0)

    def is_due(self, step: int) -> bool:
        """Returns whether to save a checkpoint after `step` steps."""
        return self._config.every > 0 and step % self._config.every == 0

    def check_space(self, state: TrainState, count: int) -> None:
        """Raises InputError unless a local disk has space for so many checkpoints, those that are there among them.

        What a job that was killed had begun to write is removed. Call it only when nothing is being written.

        Args:
          state: The state to save, or its shapes.
          count: Number of checkpoints.
        """
        params = jax.eval_shape(merge_adapters, state.params) if self._has_adapters else state.params
        leaves = jax.tree.leaves((params, self._training(jax.eval_shape(lambda state: state, state))))
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

        def check() -> None:
            if jax.process_index() == 0 and not is_url(self._folder):
                for unfinished in pathlib.Path(self._folder).glob(_UNFINISHED):
                    shutil.rmtree(unfinished)
                lacking = max(count - len(steps_in(self._folder)), 1)
                what = f"{lacking} checkpoint{'s' if lacking > 1 else ''} of {human_bytes(nbytes)}"
                advice = "lower --config.checkpoint.keep" if lacking > 2 else "choose another disk"
                check_space(self._folder, lacking * nbytes, what, advice)

        run_on_all_hosts(check)

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Starts to write a checkpoint, unless there is one of this step; returns when the arrays are copied.

        Raises:
          InputError: The disk is full, or became so while the checkpoint before was written.
        """
        if self._manager.latest_step() == step:
            return
        self.wait()
        self.check_space(state, 1)
        params = jax.jit(merge_adapters)(state.params) if self._has_adapters else state.params
        training = self._training(state)
        items = {
            PARAMS: ocp.args.StandardSave(params, _one_layer_per_chunk(params)),
            TRAINING: ocp.args.StandardSave(training),
            _DATA: ocp.args.JsonSave(data_state),
        }
        if self._config.digests:
            read = {TRAINING: training} if self._has_adapters else {TRAINING: training, PARAMS: params}
            items[_DIGESTS] = ocp.args.JsonSave(self._digests(read, state.step.sharding))
        with translate_write_errors(self._folder):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, target: TrainState, base: TrainState | None = None) -> Resumed:
        """Returns the newest checkpoint that can be read.

        Damaged ones that are newer are put aside, with a warning.

        Args:
          target: Shapes and shardings of the state; the mesh may be another than the one that saved.
          base: State at step 0 of a run with adapters; None of other runs.

        Raises:
          InputError: No checkpoint is whole, or the frozen weights of `base` are not those that the run began from.
        """
        damages: dict[int, str] = {}
        below, resumed = None, None
        while resumed is None:
            below, found = self._newest_whole(below)
            damages |= found
            if below == _NONE:
                self._require_no_damage(damages)
            resumed = self._read(below, target, base, damages)
        self._put_aside(damages, resumed.step)
        return resumed

    def wait(self) -> None:
        """Waits until everything that was started is on disk; raises InputError where the disk is full."""
        with translate_write_errors(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes and ends the writing threads."""
        if "_manager" in vars(self):
            with translate_write_errors(self._folder):
                self._manager.close()

    def _newest_whole(self, below: int | None) -> tuple[int, dict[int, str]]:
        """Returns the newest step below another that looks whole, and what is wrong with those that it passes."""
        damages: dict[int, str] = {}

        def find() -> int:
            with translate_io_errors(self._folder):
                for folder in steps_in(self._folder):
                    step = int(folder.name)
                    if below is not None and step >= below:
                        continue
                    if not (damage := step_damage(folder, _TREES, _OBJECTS)):
                        return step
                    damages[step] = damage
            return _NONE

        return from_first_host(find), damages

    def _read(self, step: int, target: TrainState, base: TrainState | None, damages: dict[int, str]) -> Resumed | None:
        """Reads a checkpoint; where that fails on any process, adds the reason to `damages` and returns None."""
        folder, wanted = self._folder / str(step), {TRAINING: ocp.args.StandardRestore(self._training(target))}
        if base is None:
            wanted[PARAMS] = ocp.args.StandardRestore(target.params)
        restored: dict[str, Any] = {}
        failure = ""

        def read() -> None:
            nonlocal failure
            try:
                with own_checkpointer() as checkpointer:
                    restored.update(checkpointer.restore(folder, args=ocp.args.Composite(**wanted)).items())
                for item in (_DATA, *((_DIGESTS,) if _DIGESTS in list_dir(folder) else ())):
                    restored[item] = json.loads((folder / item / "metadata").read_bytes())
            except (InputError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:
                if is_unreachable(error):
                    with translate_io_errors(folder):
                        raise
                failure = printable(str(error).strip() or type(error).__name__)

        run_on_all_hosts(read)
        failure = agreed(failure) or self._changed(restored, target.step.sharding)
        if failure:
            damages[step] = failure
            return None
        training = restored[TRAINING]
        if base is not None:
            self._check_base(base, training[_FROZEN])
        params = restored[PARAMS] if base is None else map_paths(training[TRAINED].get, base.params)
        return Resumed(step, TrainState(training["step"], params, training["opt_state"]), restored[_DATA])

    def _changed(self, restored: dict[str, Any], sharding: jax.sharding.Sharding) -> str:
        """Returns which arrays are not those that were saved, where a checkpoint has digests of them."""
        if _DIGESTS not in restored:
            return ""
        found = self._digests({item: restored[item] for item in _TREES if item in restored}, sharding)
        changed = [path for path, digest in found.items() if restored[_DIGESTS].get(path) != digest]
        return f"{changed[0]} and {len(changed) - 1} more arrays have other bits than were saved" if changed else ""

    def _digests(self, trees: dict[str, Any], sharding: jax.sharding.Sharding) -> dict[str, int]:
        """Returns the checksum of each array by path."""
        leaves = flatten(trees)
        sums = jax.jit(checksums, out_shardings=sharding)([*leaves.values()])
        return dict(zip(leaves, np.asarray(sums).tolist(), strict=True))

    def _require_no_damage(self, damages: dict[int, str]) -> None:
        """Raises InputError on all processes where the first knows of damaged steps, none of them being whole."""

        def check() -> None:
            if jax.process_index() == 0 and damages:
                newest = max(damages)
                raise InputError(
                    f"{self._folder / str(newest)}: damaged ({damages[newest]}), and no other checkpoint is whole; "
                    f"restore the folder, or remove {self._folder} to start the run over"
                )

        run_on_all_hosts(check)

    def _put_aside(self, damages: dict[int, str], resumed: int) -> None:
        """Renames damaged steps, so that they are neither counted nor in the way when the run comes to them again."""

        def rename() -> None:
            for step, damage in damages.items() if jax.process_index() == 0 else ():
                with translate_write_errors(self._folder):
                    aside = put_aside(self._folder / str(step))
                logger.warning(
                    "warning: %s is damaged (%s); going on from %s. The damaged one is now %s and may be removed",
                    self._folder / str(step),
                    damage,
                    self._folder / str(resumed),
                    aside.name,
                )

        run_on_all_hosts(rename)

    def _flush(self) -> None:
        """Writes what Orbax has not yet renamed to the disk: its arrays are there already, its small files are not."""
        for folder in () if is_url(self._folder) else pathlib.Path(self._folder).glob(_UNFINISHED):
            flush_tree(folder)

    def _training(self, state: TrainState) -> dict[str, Any]:
        kept = {"step": state.step, "opt_state": state.opt_state}
        if self._has_adapters:
            trained, frozen = split(state.params, self._optimizer.mask)
            kept |= {TRAINED: flatten(trained), _FROZEN: self._checksums(frozen, state.step.sharding)}
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
