"""The chunked training loss and its gradients, against all logits at once, with the released vocabulary."""

import jax
import jax.numpy as jnp

from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Table
from vl3_jax.bench.timing import measure_case, temporaries
from vl3_jax.kernels.einsum import einsum
from vl3_jax.model import preset
from vl3_jax.training.cross_entropy import token_losses

PLAIN = "plain logits"


def measure(settings: Settings) -> Table:
    """Measures the value and the gradients with respect to hidden states and unembedding."""
    text = preset("tiny" if settings.small else "2b").text
    tokens = settings.pick(64, 1024, 4096)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, tokens, text.hidden_size), settings.dtype)
    unembedding = 0.02 * jax.random.normal(keys[1], (text.vocab_size, text.hidden_size), settings.dtype)
    targets = jax.random.randint(keys[2], (1, tokens), 0, text.vocab_size)
    sides = {
        side: settings.compiled(jax.value_and_grad(loss, argnums=(0, 1)), hidden, unembedding, targets)
        for side, loss in ((OURS, chunked), (PLAIN, plain))
    }
    flops = 3 * 2 * tokens * text.hidden_size * text.vocab_size
    case = f"{tokens:,} tokens, {text.vocab_size:,} rows of {text.hidden_size:,}"
    rows = measure_case(case, sides, settings.rounds, tokens, "tokens", flops, temporaries(sides))
    return Table("loss", f"cross-entropy, {settings.dtype}, forward and backward", rows)


def chunked(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the summed loss of [B, L] targets as training computes it."""
    return token_losses(hidden, unembedding, targets, jnp.ones(targets.shape, bool)).sum()


def plain(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the summed loss of [B, L] targets with all logits in memory."""
    logits = einsum("bld,vd->blv", hidden, unembedding, out_dtype=jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - target_logits).sum()
