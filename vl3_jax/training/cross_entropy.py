"""Cross-entropy of the next token without logits in memory: tiles of tokens x vocabulary, forward and backward.

The forward pass keeps a running log-sum-exp of each token, the backward pass recomputes one tile of probabilities at a
time (as FlashAttention-2 does for attention, arXiv 2307.08691, and "Cut Your Losses", arXiv 2411.09009, for this loss).
Blocks of the vocabulary are the outer loop, so a block of the unembedding's gradient is summed in float32 and written
once: no second copy of it exists, whatever its type. Tokens that are not asked for are sorted to the end and never
multiplied.

On a mesh each device works on its own tokens. A mesh axis that splits tokens and vocabulary alike (fsdp) gathers one
block of the unembedding at a time and scatters the block's gradient; an axis that splits the vocabulary alone (tensor)
keeps its part of it, and only sums over tokens are exchanged.

Letters: B rows, L positions, D width, V vocabulary; in the loops t tokens and v vocabulary rows of a tile.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import MASKED
from vl3_jax.parallel.rules import current_mesh, partition_spec

TOKEN_BLOCK = 1024
VOCAB_BLOCK = 8192


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Sizes of a tile and the mesh axes of the unembedding, all as one device sees them.

    Attributes:
      vocab_axis: dimension of the unembedding that is the vocabulary, 0 or 1.
      token_block, vocab_block: rows of a tile.
      vocab: axes that split the vocabulary, major first.
      gathered: those of them over which a block is gathered (they split the tokens too).
      width: axes that split the other dimension; always gathered.
      summed: further axes that split the tokens.
      copies: how many devices of `width` hold the same tokens.
    """

    vocab_axis: int
    token_block: int
    vocab_block: int
    vocab: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    copies: int = 1

    @property
    def parted(self) -> tuple[str, ...]:
        """Axes over which the vocabulary stays split."""
        return tuple(axis for axis in self.vocab if axis not in self.gathered)

    def fitted(self, tokens: int) -> "_Layout":
        """For a device that has no more than `tokens`."""
        return dataclasses.replace(self, token_block=min(self.token_block, tokens))

    @property
    def block_letters(self) -> str:
        return "vd" if self.vocab_axis == 0 else "dv"


def token_losses(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    *,
    vocab_axis: int = 0,
    token_block: int = TOKEN_BLOCK,
    vocab_block: int = VOCAB_BLOCK,
) -> jax.Array:
    """-log softmax(hidden . unembedding)[target] of each position, in float32.

    Args:
      hidden: [B, L, D]; the products are taken in its type and summed in float32.
      unembedding: [V, D] where `vocab_axis` is 0 (a tied embedding), [D, V] where it is 1; any float type. Its gradient
        has its type and is computed only where it is asked for.
      targets: [B, L] int32, below V wherever wanted.
      wanted: [B, L] bool; the others give 0, and cost and receive nothing.
      vocab_axis: see `unembedding`.
      token_block, vocab_block: the largest tile whose logits exist at a time.

    Returns:
      [B, L] float32, in nats.
    """
    return _losses(hidden, unembedding, targets, wanted, (vocab_axis, token_block, vocab_block))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _losses(hidden, unembedding, targets, wanted, options):
    return _run(_forward, hidden, unembedding, (targets, wanted), options)[0]


def _losses_forward(hidden, unembedding, targets, wanted, options):
    trained = unembedding.perturbed
    hidden, unembedding, targets, wanted = (x.value for x in (hidden, unembedding, targets, wanted))
    losses, lse = _run(_forward, hidden, unembedding, (targets, wanted), options)
    # The residuals' structure is all that tells the backward pass, before it is traced, what is trained.
    return losses, (hidden, unembedding, targets, wanted, lse, () if trained else None)


def _losses_backward(options, residuals, d_losses):
    hidden, unembedding, targets, wanted, lse, trained = residuals
    if isinstance(d_losses, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    backward = functools.partial(_backward, trained=trained is not None)
    tokens = (targets, wanted, lse, d_losses)
    d_hidden, d_unembedding = _run(backward, hidden, unembedding, tokens, options)
    return d_hidden, d_unembedding if trained is not None else None, None, None


_losses.defvjp(_losses_forward, _losses_backward, symbolic_zeros=True)


def _run(function, hidden, unembedding, tokens, options):
    """`function` on this device's tokens and part of the unembedding; under a mesh, in a `shard_map`."""
    vocab_axis, token_block, vocab_block = options
    mesh = current_mesh()
    if mesh is None:
        return function(hidden, unembedding, *tokens, layout=_Layout(vocab_axis, token_block, vocab_block))
    hidden_spec = partition_spec(("batch", "length", None), hidden.shape, mesh)
    names = ("vocab", "embed") if vocab_axis == 0 else ("embed", "vocab")
    spec = partition_spec(names, unembedding.shape, mesh)
    of_tokens = [*_axes(hidden_spec[0]), *_axes(hidden_spec[1])]
    vocab, width = _axes(spec[vocab_axis]), _axes(spec[1 - vocab_axis])
    layout = _Layout(
        vocab_axis,
        token_block,
        vocab_block,
        vocab=vocab,
        gathered=tuple(axis for axis in vocab if axis in of_tokens),
        width=width,
        summed=tuple(axis for axis in of_tokens if axis not in vocab + width),
        copies=math.prod(mesh.shape[axis] for axis in width if axis not in of_tokens),
    )
    token_spec = PartitionSpec(*hidden_spec[:2])
    in_specs = (hidden_spec, spec, *[token_spec] * len(tokens))
    out_specs = (token_spec, token_spec) if function is _forward else (hidden_spec, spec)
    local = functools.partial(function, layout=layout)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(hidden, unembedding, *tokens)


def _axes(spec) -> tuple[str, ...]:
    return () if spec is None else (spec,) if isinstance(spec, str) else tuple(spec)


def _forward(hidden, unembedding, targets, wanted, *, layout):
    """Losses and log-sum-exps, [B, L] float32 each, 0 where not wanted."""
    layout = layout.fitted(wanted.size)
    order, count = _compact(wanted, layout)
    x, y = _take(hidden, order), _take(targets, order)
    tile, tiles = layout.token_block, -(-count // layout.token_block)

    def over_vocabulary(j, state):
        block, ids = _block(unembedding, j, x.dtype, layout)

        def over_tokens(i, state):
            peak, total, picked = (lax.dynamic_slice_in_dim(array, i * tile, tile) for array in state)
            scores, is_target = _scores(x, y, i, block, ids, layout)
            new_peak = jnp.maximum(peak, scores.max(-1))
            total = total * jnp.exp(peak - new_peak) + jnp.exp(scores - new_peak[:, None]).sum(-1)
            picked += jnp.where(is_target, scores, 0.0).sum(-1)
            new = (new_peak, total, picked)
            return tuple(lax.dynamic_update_slice_in_dim(a, b, i * tile, 0) for a, b in zip(state, new, strict=True))

        return lax.fori_loop(0, tiles, over_tokens, state)

    zeros = jnp.zeros(order.shape, jnp.float32)
    start = (zeros + MASKED, zeros, zeros)
    peak, total, picked = lax.fori_loop(0, _num_blocks(unembedding, layout), over_vocabulary, start)
    if layout.parted:
        highest = lax.pmax(peak, layout.parted)
        total = lax.psum(total * jnp.exp(peak - highest), layout.parted)
        peak, picked = highest, lax.psum(picked, layout.parted)
    done = jnp.arange(len(order)) < count
    lse = jnp.where(done, peak + jnp.log(jnp.where(done, total, 1.0)), 0.0)
    inverse = jnp.argsort(order[: wanted.size]).reshape(wanted.shape)
    return jnp.where(done, lse - picked, 0.0)[inverse], lse[inverse]


def _backward(hidden, unembedding, targets, wanted, lse, d_losses, *, layout, trained):
    """Gradients of hidden, in its type, and of the unembedding in its own (zeros unless `trained`)."""
    layout = layout.fitted(wanted.size)
    order, count = _compact(wanted, layout)
    x, y, lse, d_losses = (_take(array, order) for array in (hidden, targets, lse, d_losses))
    done = jnp.arange(len(order)) < count
    # The rest of the last tile: a probability of zero, for an infinite one would not be 0 times a gradient of 0.
    d_losses, lse = jnp.where(done, d_losses, 0.0), jnp.where(done, lse, -MASKED)
    tile, tiles = layout.token_block, -(-count // layout.token_block)
    letters = layout.block_letters

    def over_vocabulary(j, state):
        d_x, d_unembedding = state
        block, ids = _block(unembedding, j, x.dtype, layout)

        def over_tokens(i, state):
            d_x, d_block = state
            here = functools.partial(lax.dynamic_slice_in_dim, start_index=i * tile, slice_size=tile)
            scores, is_target = _scores(x, y, i, block, ids, layout)
            d_scores = jnp.exp(scores - here(lse)[:, None]) - is_target
            d_scores = (d_scores * here(d_losses)[:, None]).astype(x.dtype)
            d_tile = here(d_x) + einsum(f"tv,{letters}->td", d_scores, block, out_dtype=jnp.float32)
            if trained:
                d_block += einsum(f"tv,td->{letters}", d_scores, here(x), out_dtype=jnp.float32)
            return lax.dynamic_update_slice_in_dim(d_x, d_tile, i * tile, 0), d_block

        d_block = jnp.zeros(block.shape if trained else (), jnp.float32)
        d_x, d_block = lax.fori_loop(0, tiles, over_tokens, (d_x, d_block))
        if trained:
            d_unembedding = _add_block(d_unembedding, j, _scatter(d_block, layout), layout)
        return d_x, d_unembedding

    start = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(unembedding.shape if trained else (), unembedding.dtype))
    d_x, d_unembedding = lax.fori_loop(0, _num_blocks(unembedding, layout), over_vocabulary, start)
    if layout.parted:
        d_x = lax.psum(d_x, layout.parted)
    inverse = jnp.argsort(order[: wanted.size]).reshape(wanted.shape)
    d_hidden = jnp.take(d_x.astype(hidden.dtype), inverse, axis=0, mode="clip")
    return d_hidden, d_unembedding if trained else jnp.zeros_like(unembedding)


def _compact(wanted, layout):
    """Indices of the wanted positions, then of the others (filled up to whole tiles), and how many are wanted."""
    flat = wanted.reshape(-1)
    order = jnp.argsort(~flat, stable=True)
    return jnp.pad(order, (0, -flat.size % layout.token_block)), flat.sum(dtype=jnp.int32)


def _take(array, order):
    return jnp.take(array.reshape(-1, *array.shape[2:]), order, axis=0, mode="clip")


def _num_blocks(unembedding, layout) -> int:
    return -(-unembedding.shape[layout.vocab_axis] // _vocab_rows(unembedding, layout))


def _vocab_rows(unembedding, layout) -> int:
    """Rows of the vocabulary that this device adds to a block."""
    gathered = math.prod(lax.axis_size(axis) for axis in layout.gathered)
    return min(max(layout.vocab_block // gathered, 1), unembedding.shape[layout.vocab_axis])


def _start(unembedding, j, layout):
    """Where block `j` begins; the last one begins early and repeats rows of the one before."""
    rows = _vocab_rows(unembedding, layout)
    return jnp.minimum(j * rows, unembedding.shape[layout.vocab_axis] - rows)


def _block(unembedding, j, dtype, layout):
    """Block `j` of the vocabulary, [v, D] or [D, v] in `dtype`, and its token ids [v], -1 for a repeated row."""
    axis, rows, start = layout.vocab_axis, _vocab_rows(unembedding, layout), _start(unembedding, j, layout)
    block = lax.dynamic_slice_in_dim(unembedding, start, rows, axis).astype(dtype)
    place = start + jnp.arange(rows)
    shard = lax.axis_index(layout.vocab) if layout.vocab else 0
    ids = jnp.where(place >= j * rows, place + shard * unembedding.shape[axis], -1)
    if layout.width:
        block = lax.all_gather(block, layout.width, axis=1 - axis, tiled=True)
    if layout.gathered:
        block = lax.all_gather(block, layout.gathered, axis=axis, tiled=True)
        ids = lax.all_gather(ids, layout.gathered, tiled=True)
    return block, ids


def _scatter(d_block, layout):
    """A block's gradient, summed over the devices' tokens, cut down to this device's part of it."""
    if layout.summed:
        d_block = lax.psum(d_block, layout.summed)
    if layout.gathered:
        d_block = lax.psum_scatter(d_block, layout.gathered, scatter_dimension=layout.vocab_axis, tiled=True)
    if layout.width:
        d_block = lax.psum_scatter(d_block, layout.width, scatter_dimension=1 - layout.vocab_axis, tiled=True)
        d_block /= layout.copies
    return d_block


def _add_block(d_unembedding, j, d_block, layout):
    """Writes block `j`; rows that the block before has written are zero in this one, so they are added to."""
    axis, start = layout.vocab_axis, _start(d_unembedding, j, layout)
    there = lax.dynamic_slice_in_dim(d_unembedding, start, d_block.shape[axis], axis)
    new = (there.astype(jnp.float32) + d_block).astype(d_unembedding.dtype)
    return lax.dynamic_update_slice_in_dim(d_unembedding, new, start, axis)


def _scores(x, y, i, block, ids, layout):
    """Logits [t, v] float32 of tile `i` against a block, and which of them is the target's."""
    x, y = (lax.dynamic_slice_in_dim(array, i * layout.token_block, layout.token_block) for array in (x, y))
    scores = einsum(f"td,{layout.block_letters}->tv", x, block, out_dtype=jnp.float32)
    return jnp.where(ids >= 0, scores, MASKED), ids == y[:, None]
