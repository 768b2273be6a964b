"""Cross-entropy of the next token without logits in memory: tiles of tokens x vocabulary, forward and backward.

The forward pass keeps a running log-sum-exp of each token; the backward pass recomputes one tile of probabilities at a
time, as FlashAttention-2 does for attention (arXiv 2307.08691) and "Cut Your Losses" for this loss (arXiv 2411.09009).
The outer loop runs over blocks of the vocabulary, so the gradient of a block of the unembedding is summed in float32
and written once, without a second copy of the unembedding in memory. Unsupervised tokens are sorted to the end and
never multiplied. On a CPU, where products are slow and memory is plenty, the logits are kept if they are few.

On a mesh each device works on its own tokens, and on one block of the unembedding at a time
(`vl3_jax.model.vocab_blocks`). Of devices that keep shards of the vocabulary, only sums over tokens are exchanged.

Dimension names: B rows, L positions, D width, V vocabulary; in the loops, t tokens and v vocabulary rows of a tile.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import MASKED
from vl3_jax.model.vocab_blocks import VocabBlocks
from vl3_jax.parallel.rules import current_mesh, mesh_axes, partition_spec, target_device

TOKEN_BLOCK = 1024
VOCAB_BLOCK = 8192
KEPT_BYTES = 2 * 2**30  # of logits that a CPU keeps


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Sizes of tiles, and how one device sees the unembedding.

    Attributes:
      tokens: Tokens of a tile.
      blocks: Blocks of the unembedding, each the vocabulary of a tile.
      keep: Whether the forward pass keeps the logits of supervised tokens for the backward pass.
    """

    tokens: int
    blocks: VocabBlocks
    keep: bool = False

    @property
    def block_dims(self) -> str:
        """Dimension names of a block of the unembedding."""
        return "vd" if self.blocks.axis == 0 else "dv"

    def limit_tokens(self, tokens: int) -> "_Tiles":
        """Returns tiles of at most `tokens` tokens."""
        return dataclasses.replace(self, tokens=min(self.tokens, tokens))


def token_losses(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    supervised: jax.Array,
    *,
    vocab_axis: int = 0,
    token_block: int = TOKEN_BLOCK,
    vocab_block: int = VOCAB_BLOCK,
    kept_bytes: int = KEPT_BYTES,
) -> jax.Array:
    """Computes -log softmax(hidden . unembedding)[target] of each supervised position.

    Args:
      hidden: Hidden states, [B, L, D]. Products are taken in their type and summed in float32.
      unembedding: [V, D] if `vocab_axis` is 0 (a tied embedding), [D, V] if it is 1; any float type. Its gradient has
        the same type and is computed only if it is differentiated.
      targets: Token ids, [B, L] int32, less than V wherever supervised.
      supervised: Positions with a loss, [B, L] bool. The others give 0, cost nothing and receive no gradient.
      vocab_axis: Dimension of `unembedding` that is the vocabulary.
      token_block: Largest number of tokens whose logits exist at a time.
      vocab_block: Largest number of logits of a token that exist at a time.
      kept_bytes: Largest size of the logits that one CPU keeps for the backward pass.

    Returns:
      The losses in nats, [B, L] float32.
    """
    keep = _has_plenty() and 4 * supervised.size * unembedding.shape[vocab_axis] <= kept_bytes
    tiles = _Tiles(token_block, VocabBlocks(vocab_axis, vocab_block), keep)
    return _losses(hidden, unembedding, targets, supervised, tiles)


def _has_plenty() -> bool:
    """Returns whether all runs on one CPU."""
    mesh = current_mesh()
    return target_device().platform == "cpu" and (mesh is None or mesh.size == 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _losses(hidden, unembedding, targets, supervised, tiles):
    return _run(_forward, hidden, unembedding, (targets, supervised), dataclasses.replace(tiles, keep=False))[0]


def _losses_forward(hidden, unembedding, targets, supervised, tiles):
    trainable = unembedding.perturbed
    hidden, unembedding, targets, supervised = (x.value for x in (hidden, unembedding, targets, supervised))
    losses, lse, kept = _run(_forward, hidden, unembedding, (targets, supervised), tiles)
    # Whether the unembedding is trainable must be static in the backward pass; the pytree structure of the residuals
    # (an empty tuple or None) carries it there.
    return losses, (hidden, unembedding, targets, supervised, lse, kept, () if trainable else None)


def _losses_backward(tiles, residuals, d_losses):
    hidden, unembedding, targets, supervised, lse, kept, trainable = residuals
    if isinstance(d_losses, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    backward = functools.partial(_backward, trainable=trainable is not None)
    tokens = (targets, supervised, lse, d_losses)
    d_hidden, d_unembedding = _run(backward, hidden, unembedding, tokens, tiles, kept)
    return d_hidden, d_unembedding if trainable is not None else None, None, None


_losses.defvjp(_losses_forward, _losses_backward, symbolic_zeros=True)


def _run(function, hidden, unembedding, tokens, tiles, *kept):
    """Runs `function` on the whole arrays, or in a `shard_map` on each device's shards if there is a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return function(hidden, unembedding, *tokens, *kept, tiles=tiles)
    hidden_spec = partition_spec(("batch", "length", None), hidden.shape, mesh)
    names = ("vocab", "embed") if tiles.blocks.axis == 0 else ("embed", "vocab")
    spec = partition_spec(names, unembedding.shape, mesh)
    token_axes = [*mesh_axes(hidden_spec[0]), *mesh_axes(hidden_spec[1])]
    tiles = dataclasses.replace(tiles, blocks=tiles.blocks.on_mesh(spec, token_axes, mesh))
    token_spec = PartitionSpec(*hidden_spec[:2])
    in_specs = (hidden_spec, spec, *[token_spec] * len(tokens), *[PartitionSpec()] * len(kept))
    out_specs = (token_spec, token_spec, PartitionSpec()) if function is _forward else (hidden_spec, spec)
    local = functools.partial(function, tiles=tiles)
    run = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return run(hidden, unembedding, *tokens, *kept)


def _forward(hidden, unembedding, targets, supervised, *, tiles):
    """Returns losses and log-sum-exps, [B, L] float32 each, 0 where not supervised; and the logits, if they are kept.

    Those are [blocks, tokens, v] float32, of tokens in the order of `_compact`.
    """
    tiles = tiles.limit_tokens(supervised.size)
    order, count = _compact(supervised, tiles)
    x, y = _take(hidden, order), _take(targets, order)
    tile, num_tiles = tiles.tokens, -(-count // tiles.tokens)

    def over_vocabulary(j, state):
        block, ids = tiles.blocks.block(unembedding, j, x.dtype)

        def over_tokens(i, state):
            *sums, kept = state
            row_max, row_sum, target_score = (lax.dynamic_slice_in_dim(array, i * tile, tile) for array in sums)
            scores = _scores(x, i, block, ids, tiles)
            is_target = ids == lax.dynamic_slice_in_dim(y, i * tile, tile)[:, None]
            new_max = jnp.maximum(row_max, scores.max(-1))
            row_sum = row_sum * jnp.exp(row_max - new_max) + jnp.exp(scores - new_max[:, None]).sum(-1)
            target_score += jnp.where(is_target, scores, 0.0).sum(-1)
            new = (new_max, row_sum, target_score)
            sums = (lax.dynamic_update_slice_in_dim(a, b, i * tile, 0) for a, b in zip(sums, new, strict=True))
            return *sums, None if kept is None else lax.dynamic_update_slice(kept, scores[None], (j, i * tile, 0))

        return lax.fori_loop(0, num_tiles, over_tokens, state)

    zeros = jnp.zeros(order.shape, jnp.float32)
    num_blocks, rows = tiles.blocks.count(unembedding), tiles.blocks.own_rows(unembedding)
    kept = jnp.zeros((num_blocks, len(order), rows), jnp.float32) if tiles.keep else None
    init = (zeros + MASKED, zeros, zeros, kept)
    row_max, row_sum, target_score, kept = lax.fori_loop(0, num_blocks, over_vocabulary, init)
    if tiles.blocks.split_axes:
        global_max = lax.pmax(row_max, tiles.blocks.split_axes)
        row_sum = lax.psum(row_sum * jnp.exp(row_max - global_max), tiles.blocks.split_axes)
        row_max, target_score = global_max, lax.psum(target_score, tiles.blocks.split_axes)
    valid = jnp.arange(len(order)) < count
    lse = jnp.where(valid, row_max + jnp.log(jnp.where(valid, row_sum, 1.0)), 0.0)
    inverse = jnp.argsort(order[: supervised.size]).reshape(supervised.shape)
    return jnp.where(valid, lse - target_score, 0.0)[inverse], lse[inverse], kept


def _backward(hidden, unembedding, targets, supervised, lse, d_losses, kept, *, tiles, trainable):
    """Returns the gradients of hidden states and unembedding in their types; the latter is 0 unless `trainable`."""
    tiles = tiles.limit_tokens(supervised.size)
    order, count = _compact(supervised, tiles)
    x, y, lse, d_losses = (_take(array, order) for array in (hidden, targets, lse, d_losses))
    valid = jnp.arange(len(order)) < count
    # Unsupervised tokens that fill the last tile get a huge log-sum-exp, hence probabilities of 0: with their own, of
    # 0, a probability may be infinite, and infinity times a gradient of 0 is NaN.
    d_losses, lse = jnp.where(valid, d_losses, 0.0), jnp.where(valid, lse, -MASKED)
    tile, num_tiles = tiles.tokens, -(-count // tiles.tokens)
    dims = tiles.block_dims

    def over_vocabulary(j, state):
        d_x, d_unembedding = state
        block, ids = tiles.blocks.block(unembedding, j, x.dtype)

        def over_tokens(i, state):
            d_x, d_block = state
            take_tile = functools.partial(lax.dynamic_slice_in_dim, start_index=i * tile, slice_size=tile)
            if kept is None:
                scores = _scores(x, i, block, ids, tiles)
            else:
                scores = lax.dynamic_slice(kept, (j, i * tile, 0), (1, tile, kept.shape[2]))[0]
            d_scores = jnp.exp(scores - take_tile(lse)[:, None]) - (ids == take_tile(y)[:, None])
            d_scores = (d_scores * take_tile(d_losses)[:, None]).astype(x.dtype)
            d_tile = take_tile(d_x) + einsum(f"tv,{dims}->td", d_scores, block, out_dtype=jnp.float32)
            if trainable:
                d_block += einsum(f"tv,td->{dims}", d_scores, take_tile(x), out_dtype=jnp.float32)
            return lax.dynamic_update_slice_in_dim(d_x, d_tile, i * tile, 0), d_block

        d_block = jnp.zeros(block.shape if trainable else (), jnp.float32)
        d_x, d_block = lax.fori_loop(0, num_tiles, over_tokens, (d_x, d_block))
        if trainable:
            d_unembedding = tiles.blocks.add(d_unembedding, j, tiles.blocks.scatter(d_block))
        return d_x, d_unembedding

    init = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(unembedding.shape if trainable else (), unembedding.dtype))
    d_x, d_unembedding = lax.fori_loop(0, tiles.blocks.count(unembedding), over_vocabulary, init)
    if tiles.blocks.split_axes:
        d_x = lax.psum(d_x, tiles.blocks.split_axes)
    inverse = jnp.argsort(order[: supervised.size]).reshape(supervised.shape)
    d_hidden = jnp.take(d_x.astype(hidden.dtype), inverse, axis=0, mode="clip")
    return d_hidden, d_unembedding if trainable else jnp.zeros_like(unembedding)


def _compact(supervised, tiles):
    """Returns the positions, supervised ones first, padded to whole tiles, and the number of supervised ones."""
    flat = supervised.reshape(-1)
    order = jnp.argsort(~flat, stable=True)
    return jnp.pad(order, (0, -flat.size % tiles.tokens)), flat.sum(dtype=jnp.int32)


def _take(array, order):
    """Returns the tokens of [B, L, ...] at flat indices `order`."""
    return jnp.take(array.reshape(-1, *array.shape[2:]), order, axis=0, mode="clip")


def _scores(x, i, block, ids, tiles):
    """Returns the logits of token tile `i` against a block, [t, v] float32."""
    x = lax.dynamic_slice_in_dim(x, i * tiles.tokens, tiles.tokens)
    scores = einsum(f"td,{tiles.block_dims}->tv", x, block, out_dtype=jnp.float32)
    return jnp.where(ids >= 0, scores, MASKED)
