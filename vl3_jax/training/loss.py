"""The training loss: weighted next-token cross-entropy, summed, in all and for each task.

Sums, not means: the caller divides by the weight of the whole global batch, so that no device, microbatch or row
counts more than its tokens (the reference trainer averages over devices instead).
"""

import flax.struct
import jax
import jax.numpy as jnp

from vl3_jax.errors import InputError
from vl3_jax.model.config import TextConfig
from vl3_jax.model.quantize import QuantizedKernel
from vl3_jax.training.cross_entropy import token_losses


@flax.struct.dataclass
class LossSums:
    """Sums over a batch, float32; those of several batches add up.

    Attributes:
      loss: [] sum of weight * loss, in nats.
      weight: [] sum of the weights.
      task_loss, task_weight: [tasks] the same for each task.
    """

    loss: jax.Array
    weight: jax.Array
    task_loss: jax.Array
    task_weight: jax.Array


def unembedding(params: dict, config: TextConfig) -> tuple[jax.Array, int]:
    """The matrix from hidden states to logits and its vocabulary dimension: [V, D] and 0 if tied, else [D, V] and 1.

    Raises:
      InputError: the matrix is quantised.
    """
    if config.tie_word_embeddings:
        return params["llm"]["embed"]["embedding"], 0
    kernel = params["llm"]["lm_head"]["kernel"]
    if isinstance(kernel, QuantizedKernel):
        raise InputError("parameter llm/lm_head/kernel is int8; training over a quantised model needs its head whole")
    return kernel, 1


def loss_sums(
    hidden: jax.Array,
    unembedding: jax.Array,
    batch: dict[str, jax.Array],
    *,
    vocab_axis: int,
    tasks: int = 1,
    **blocks: int,
) -> LossSums:
    """Weighted cross-entropy of a packed batch.

    Args:
      hidden: [B, L, D], after the final norm.
      unembedding: [V, D] or [D, V].
      batch: of the packed batch `targets`, `loss_weight`, `segment_ids` [B, L] and `sample_task` [B, S].
      vocab_axis: which dimension of `unembedding` is the vocabulary.
      tasks: how many tasks there are; a sample of a task beyond them counts in the whole only.
      **blocks: `token_block`, `vocab_block` of `token_losses`.
    """
    weight = batch["loss_weight"].astype(jnp.float32)
    losses = token_losses(hidden, unembedding, batch["targets"], weight != 0, vocab_axis=vocab_axis, **blocks)
    weighted = losses * weight
    of_task = token_tasks(batch["sample_task"], batch["segment_ids"])[..., None] == jnp.arange(tasks)

    def by_task(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(of_task, values[..., None], 0.0), axis=(0, 1))

    return LossSums(weighted.sum(), weight.sum(), by_task(weighted), by_task(weight))


def token_tasks(sample_task: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[B, L] int32: the task of each token's sample, -1 for padding. From [B, S] and [B, L] (1.. per sample)."""
    task = jnp.take_along_axis(sample_task, jnp.maximum(segment_ids - 1, 0), axis=1, mode="clip")
    return jnp.where(segment_ids > 0, task, -1)
