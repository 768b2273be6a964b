"""The training loss: weighted next-token cross-entropy, summed over the batch and over each task.

The functions return sums, not means: the caller divides by the weight of the whole global batch, so that no device,
microbatch or row counts more than its tokens. The reference trainer averages over devices instead.
"""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from vl3_jax.model.config import TextConfig
from vl3_jax.training.cross_entropy import token_losses


@flax.struct.dataclass
class LossSums:
    """Sums over a batch, all float32. The sums of several batches can be added.

    Attributes:
      loss: Sum of weight * loss in nats, [].
      weight: Sum of the weights, [].
      task_loss: Sum of weight * loss of each task, [tasks].
      task_weight: Sum of the weights of each task, [tasks].
    """

    loss: jax.Array
    weight: jax.Array
    task_loss: jax.Array
    task_weight: jax.Array


def unembedding(params: dict, config: TextConfig) -> tuple[jax.Array, int]:
    """Returns the matrix from hidden states to logits, and which of its dimensions is the vocabulary.

    Returns:
      The embedding [V, D] and 0 if it is tied, otherwise the kernel [D, V] of the output head and 1.
    """
    if config.tie_word_embeddings:
        return params["llm"]["embed"]["embedding"], 0
    return params["llm"]["lm_head"]["kernel"], 1


def loss_sums(
    hidden: jax.Array,
    unembedding: jax.Array,
    batch: Mapping[str, jax.Array],
    *,
    vocab_axis: int,
    tasks: int = 1,
    **sizes: int,
) -> LossSums:
    """Computes the weighted cross-entropy of a packed batch.

    Args:
      hidden: Hidden states after the final norm, [B, L, D].
      unembedding: Matrix from hidden states to logits, [V, D] or [D, V].
      batch: Packed batch of which `targets`, `loss_weight` and `segment_ids` [B, L] and `sample_task` [B, S] are read.
      vocab_axis: Dimension of `unembedding` that is the vocabulary.
      tasks: Number of tasks. Samples with a larger task id count in the total only.
      **sizes: `token_block`, `vocab_block` and `kept_bytes` of `token_losses`.
    """
    weight = batch["loss_weight"].astype(jnp.float32)
    losses = token_losses(hidden, unembedding, batch["targets"], weight != 0, vocab_axis=vocab_axis, **sizes)
    weighted = losses * weight
    of_task = token_tasks(batch["sample_task"], batch["segment_ids"])[..., None] == jnp.arange(tasks)

    def by_task(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(of_task, values[..., None], 0.0), axis=(0, 1))

    return LossSums(weighted.sum(), weight.sum(), by_task(weighted), by_task(weight))


def token_tasks(sample_task: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Returns the task id of each token's sample.

    Args:
      sample_task: Task id of each packed sample, [B, S] int32.
      segment_ids: Sample of each token, counted from 1, [B, L] int32; 0 is padding.

    Returns:
      Task ids, [B, L] int32; -1 for padding.
    """
    task = jnp.take_along_axis(sample_task, jnp.maximum(segment_ids - 1, 0), axis=1, mode="clip")
    return jnp.where(segment_ids > 0, task, -1)
