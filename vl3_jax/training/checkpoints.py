"""What a run keeps: parameters, optimizer and place in the data, every so many steps, written while training goes on.

    WORKDIR/checkpoints/<step>/params       the model, as every command reads it (adapters merged)
    WORKDIR/checkpoints/<step>/training     what only resuming needs: moments, step, unmerged adapters
    WORKDIR/checkpoints/<step>/data         place in the data, JSON

A step's folder gets its name when it is complete, so whenever a job is killed, the last complete one is there.
"""

import re
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from vl3_jax.checkpoint.paths import translate_io_errors
from vl3_jax.training.groups import flatten, map_paths, split
from vl3_jax.training.lora import merge_adapters
from vl3_jax.training.optimizer import Optimizer
from vl3_jax.training.state import TrainState

FOLDER = "checkpoints"
TRAINING, LEARNED = "training", "learned"
_PARAMS, _DATA = "params", "data"


class Checkpoints:
    """The checkpoints of one workdir, local or gs://.

    Args:
      workdir: of the run.
      optimizer: tells what learns.
      every: steps between two; 0 keeps the last state only.
      keep: how many of the newest stay; 0 keeps all.
      adapted: the parameters have adapters. Their base is not kept: resuming takes it from the run's start.

    Raises:
      InputError: gs:// whose bucket may not be looked at; one line.
    """

    def __init__(self, workdir: epath.Path, optimizer: Optimizer, every: int, keep: int, adapted: bool):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep or None, enable_async_checkpointing=True)
        items = (_PARAMS, TRAINING, _DATA)
        with translate_io_errors(workdir):
            self._manager = ocp.CheckpointManager(workdir / FOLDER, options=options, item_names=items)
        self._optimizer, self._every, self._adapted = optimizer, every, adapted

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether one is wanted after `step` steps."""
        return self._every > 0 and step % self._every == 0

    def save(self, step: int, state: TrainState, place: dict[str, Any]) -> None:
        """Begins to write a checkpoint, unless there is one of this step; returns when the arrays are copied."""
        if self.latest == step:
            return
        params = jax.jit(merge_adapters)(state.params) if self._adapted else state.params
        items = {
            _PARAMS: ocp.args.StandardSave(params, _layer_by_layer(params)),
            TRAINING: ocp.args.StandardSave(self._training(state)),
            _DATA: ocp.args.JsonSave(place),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def place(self, step: int) -> dict[str, Any]:
        """The place in the data after `step` steps."""
        return self._manager.restore(step, args=ocp.args.Composite(**{_DATA: ocp.args.JsonRestore()}))[_DATA]

    def restore(self, step: int, target: TrainState, base: TrainState | None = None) -> TrainState:
        """The state after `step` steps.

        Args:
          step: of the checkpoint.
          target: shapes and shardings; those of another mesh than the one that saved are fine.
          base: of a run with adapters, its state at step 0.
        """
        wanted = {TRAINING: ocp.args.StandardRestore(self._training(target))}
        if not self._adapted:
            wanted[_PARAMS] = ocp.args.StandardRestore(target.params)
        found = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        training = found[TRAINING]
        if self._adapted:
            learned = training[LEARNED]
            params = map_paths(lambda path, leaf: learned.get(path, leaf), base.params)
        else:
            params = found[_PARAMS]
        return TrainState(training["step"], params, training["opt_state"])

    def wait(self) -> None:
        """Until everything begun is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the writing threads."""
        self._manager.close()

    def _training(self, state: TrainState) -> dict[str, Any]:
        kept = {"step": state.step, "opt_state": state.opt_state}
        if self._adapted:
            kept[LEARNED] = flatten(split(state.params, self._optimizer.mask)[0])
        return kept


def _layer_by_layer(params: Any) -> Any:
    """How Orbax is to store parameters: one layer a chunk, so that who reads a layer need not read all of them."""

    def of_leaf(path, _leaf) -> ocp.SaveArgs:
        stacked = "layers" in re.split(r"\W+", jax.tree_util.keystr(path))
        return ocp.SaveArgs(shard_axes=(0,)) if stacked else ocp.SaveArgs()

    return jax.tree_util.tree_map_with_path(of_leaf, params)
