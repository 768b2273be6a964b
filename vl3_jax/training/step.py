"""One optimizer step, and its evaluation counterpart, as compiled functions of a packed batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vl3_jax.errors import InputError
from vl3_jax.model import VideoLLaMA3, decode, encode
from vl3_jax.parallel.rules import VISION_ROW_ARRAYS, constrain
from vl3_jax.training.groups import merge, split
from vl3_jax.training.loss import LossSums, loss_sums, unembedding
from vl3_jax.training.optimizer import Optimizer
from vl3_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]


def batch_loss(model: VideoLLaMA3, params: Any, batch: Batch, tasks: int = 1) -> LossSums:
    """The forward pass of a packed batch, to sums of its loss. A batch without `patches` has nothing to see."""
    features = None
    if "patches" in batch:
        vision = (batch[name] for name in ("patches", "patch_segment", "patch_hw", "token_patches"))
        with jax.named_scope("encode"):
            features = encode(model, params, *vision)
    text = (batch[name] for name in ("vision_slot", "segment_ids", "positions"))
    with jax.named_scope("decode"):
        hidden, _ = decode(model, params, batch["tokens"], features, *text)
    with jax.named_scope("loss"):
        matrix, vocab_axis = unembedding(params, model.config.text)
        return loss_sums(hidden, matrix, batch, vocab_axis=vocab_axis, tasks=tasks)


def make_train_step(
    model: VideoLLaMA3,
    optimizer: Optimizer,
    *,
    grad_accum_steps: int = 1,
    tasks: int = 1,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted step, to be called under `jax.set_mesh` where there is a mesh. It consumes the state it is given.

    The gradient is that of the sum of weighted losses over the sum of weights, both of the whole global batch, however
    it is cut up. What is frozen has no gradient, and a tower with nothing to learn below the decoder is only run
    forward.

    Args:
      model: its `dtype` is that of the activations, its remat policies bound their memory.
      optimizer: resolved for the parameters of the states to come.
      accumulation: microbatches; must divide the rows of a batch. Microbatch i has rows i, i + accumulation, ..., so
        that it is spread over the mesh as the batch is where its rows still divide.
      tasks: how many tasks have a loss of their own.
      shardings: of the state, from `state_shardings`; new states keep them.

    Returns:
      (state, batch) -> (state, metrics). Metrics: `loss` (mean over the weight), `weight`, `task_loss` and
      `task_weight` (sums, [tasks]), `grad_norm` (before clipping), `learning_rates` (by group, of this step),
      `supervised_tokens`, `tokens` (int32), and `finite`: whether loss and gradient are; where they are not, the state
      comes back as it was, step included.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, frozen = split(state.params, optimizer.mask)
        weight = batch["loss_weight"].sum(dtype=jnp.float32)
        share = 1.0 / jnp.where(weight == 0, 1.0, weight)

        def objective(trainable: Any, rows: Batch) -> tuple[jax.Array, LossSums]:
            sums = batch_loss(model, merge(trainable, frozen), rows, tasks)
            return sums.loss * share, sums

        sums, gradients = _accumulate(jax.grad(objective, has_aux=True), trainable, batch, grad_accum_steps, tasks)
        if shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, split(shardings.params, optimizer.mask)[0])
        with jax.named_scope("optimizer"):
            loss, norm = sums.loss * share, optax.tree.norm(gradients)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            updated, opt_state = optimizer.update(gradients, state.opt_state, trainable)
            new = (state.step + 1, updated, opt_state)
            old = (state.step, trainable, state.opt_state)
            count, updated, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = {
            "loss": loss,
            "weight": sums.weight,
            "task_loss": sums.task_loss,
            "task_weight": sums.task_weight,
            "grad_norm": norm,
            "learning_rates": optimizer.learning_rates(state.step),
            "supervised_tokens": jnp.sum(batch["loss_weight"] != 0, dtype=jnp.int32),
            "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.int32),
            "finite": finite,
        }
        return TrainState(count, merge(updated, frozen), opt_state), metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    everywhere = NamedSharding(shardings.step.mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, everywhere))


def make_eval_step(model: VideoLLaMA3, tasks: int = 1) -> Callable[[Any, Batch], LossSums]:
    """A jitted (params, batch) -> sums of the batch's loss; those of several batches add up."""
    return jax.jit(lambda params, batch: batch_loss(model, params, batch, tasks))


def _accumulate(gradient: Callable, trainable: Any, batch: Batch, parts: int, tasks: int) -> tuple[LossSums, Any]:
    """Sums of losses and float32 gradients over the microbatches, one after another."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    rows = len(batch["tokens"])
    if parts < 1 or rows % parts:
        raise InputError(f"a batch of {rows} rows cannot be cut into {parts} microbatches; accumulation must divide it")
    if parts == 1:
        gradients, sums = gradient(trainable, batch)
        return sums, wide(gradients)
    interleaved = {name: array.reshape(rows // parts, parts, *array.shape[1:]) for name, array in batch.items()}

    def add(totals: tuple[LossSums, Any], part: jax.Array) -> tuple[tuple[LossSums, Any], None]:
        gradients, sums = gradient(trainable, _microbatch(interleaved, part))
        return jax.tree.map(jnp.add, totals, (sums, wide(gradients))), None

    zero, by_task = jnp.zeros([], jnp.float32), jnp.zeros(tasks, jnp.float32)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable)
    totals, _ = jax.lax.scan(add, (LossSums(zero, zero, by_task, by_task), nothing), jnp.arange(parts))
    return totals


def _microbatch(interleaved: Batch, part: jax.Array) -> Batch:
    def take(name: str, array: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_index_in_dim(array, part, axis=1, keepdims=False)
        axes = ("batch", "vision_row") if name in VISION_ROW_ARRAYS else ("batch",)
        return constrain(rows, *axes, *[None] * (rows.ndim - len(axes)))

    return {name: take(name, array) for name, array in interleaved.items()}
