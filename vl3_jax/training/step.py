"""The train step and the evaluation step, as compiled functions of a packed batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vl3_jax.errors import InputError
from vl3_jax.model import VideoLLaMA3, decode, encode
from vl3_jax.parallel.rules import VISION_ROW_ARRAYS, constrain
from vl3_jax.training.groups import merge, split
from vl3_jax.training.loss import LossSums, loss_sums, unembedding
from vl3_jax.training.optimizer import Optimizer
from vl3_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, Any]


def batch_loss(model: VideoLLaMA3, params: Any, batch: Batch, tasks: int = 1) -> LossSums:
    """Runs the forward pass of a packed batch and returns the sums of its loss.

    Args:
      model: Structure and numerics of the model.
      params: Tree of parameters.
      batch: Packed batch; one without `patches` is text only.
      tasks: Number of tasks whose loss is summed apart.
    """
    features = None
    if "patches" in batch:
        vision = (batch[name] for name in ("patches", "patch_segment", "patch_hw", "token_patches"))
        with jax.named_scope("encode"):
            features = encode(model, params, *vision)
    vision_slot, segment_ids, positions = (batch[name] for name in ("vision_slot", "segment_ids", "positions"))
    with jax.named_scope("decode"):
        hidden, _ = decode(model, params, batch["tokens"], features, vision_slot, segment_ids, positions)
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
    """Builds the jitted train step, to be called under `jax.set_mesh` if there is a mesh. It donates the old state.

    The gradient is that of the sum of weighted losses divided by the sum of weights, both over the whole global batch,
    whatever its split into microbatches and shards. Frozen parameters have no gradient, and a tower without trainable
    parameters in or before it runs forward only.

    Args:
      model: Structure and numerics; its `dtype` is that of the activations, its remat policies bound their memory.
      optimizer: Optimizer of the parameters.
      grad_accum_steps: Number of microbatches; must divide the rows of a batch. Microbatch i has rows i,
        i + grad_accum_steps, ..., so that it stays spread over the mesh like the batch if its rows still divide.
      tasks: Number of tasks whose loss is reported apart.
      shardings: Shardings of the state, from `state_shardings`; new states keep them.

    Returns:
      A function (state, batch) -> (state, metrics). The metrics are `loss` (weighted mean), `weight`, `task_loss` and
      `task_weight` (sums, [tasks]), `grad_norm` (before clipping), `learning_rates` (of each group in this step),
      `supervised_tokens` and `tokens` (int32), and `finite`, whether loss and gradient are finite. If they are not, the
      state is returned unchanged, including its step.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, frozen = split(state.params, optimizer.mask)
        weight = batch["loss_weight"].sum(dtype=jnp.float32)
        scale = 1.0 / jnp.where(weight == 0, 1.0, weight)

        def objective(trainable: Any, rows: Batch) -> tuple[jax.Array, LossSums]:
            sums = batch_loss(model, merge(trainable, frozen), rows, tasks)
            return sums.loss * scale, sums

        sums, gradients = _accumulate(jax.grad(objective, has_aux=True), trainable, batch, grad_accum_steps, tasks)
        if shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, split(shardings.params, optimizer.mask)[0])
        with jax.named_scope("optimizer"):
            loss, norm = sums.loss * scale, optax.tree.norm(gradients)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            updated, opt_state = optimizer.update(gradients, state.opt_state, trainable)
            new = (state.step + 1, updated, opt_state)
            old = (state.step, trainable, state.opt_state)
            new_step, updated, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
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
        return TrainState(new_step, merge(updated, frozen), opt_state), metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    # The metrics are replicated, like the number of the step.
    return jax.jit(step, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, shardings.step))


def make_eval_step(model: VideoLLaMA3, tasks: int = 1) -> Callable[[Any, Batch], LossSums]:
    """Builds the jitted evaluation step: (params, batch) -> sums of the loss, which can be added over batches."""
    return jax.jit(lambda params, batch: batch_loss(model, params, batch, tasks))


def _accumulate(gradient: Callable, trainable: Any, batch: Batch, steps: int, tasks: int) -> tuple[LossSums, Any]:
    """Sums losses and float32 gradients over `steps` microbatches, one after another."""
    rows = len(batch["tokens"])
    if steps < 1 or rows % steps:
        raise InputError(
            f"a batch of {rows} rows cannot be cut into {steps} microbatches; grad_accum_steps must divide the rows"
        )
    if steps == 1:
        gradients, sums = gradient(trainable, batch)
        return sums, optax.tree.cast(gradients, jnp.float32)
    interleaved = {name: array.reshape(rows // steps, steps, *array.shape[1:]) for name, array in batch.items()}

    def add(totals: tuple[LossSums, Any], index: jax.Array) -> tuple[tuple[LossSums, Any], None]:
        gradients, sums = gradient(trainable, _microbatch(interleaved, index))
        return jax.tree.map(jnp.add, totals, (sums, optax.tree.cast(gradients, jnp.float32))), None

    zero, by_task = jnp.zeros([], jnp.float32), jnp.zeros(tasks, jnp.float32)
    start = LossSums(zero, zero, by_task, by_task), optax.tree.zeros_like(trainable, jnp.float32)
    return jax.lax.scan(add, start, jnp.arange(steps))[0]


def _microbatch(interleaved: Batch, index: jax.Array) -> Batch:
    """Returns microbatch `index` of arrays [rows of a microbatch, microbatches, ...]."""

    def take(name: str, array: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_index_in_dim(array, index, axis=1, keepdims=False)
        axes = ("batch", "vision_row") if name in VISION_ROW_ARRAYS else ("batch",)
        return constrain(rows, *axes, *[None] * (rows.ndim - len(axes)))

    return {name: take(name, array) for name, array in interleaved.items()}
