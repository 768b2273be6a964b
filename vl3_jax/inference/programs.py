"""The jitted programs of the engine: vision encoding, prefill of a part of a prompt, decoding of a few tokens."""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vl3_jax.inference.sampling import SamplingParams, sample_tokens
from vl3_jax.inference.token_masks import unpack_masks
from vl3_jax.model import KVCache, VideoLLaMA3, decode, encode, unembed
from vl3_jax.parallel.rules import constrain, partition_spec

STEPS_PER_CALL = 8
VISION_ARRAYS = ("patches", "patch_segment", "patch_hw", "token_patches")


@flax.struct.dataclass
class DecodeState:
    """What stays on the devices between calls, for R rows.

    Attributes:
      cache: Keys and values of all tokens but the newest.
      generated: [R, V] bool, the tokens that each row has generated.
    """

    cache: KVCache
    generated: jax.Array

    @classmethod
    def empty(cls, model: VideoLLaMA3, rows: int, slots: int) -> "DecodeState":
        """Creates the state of rows that hold nothing."""
        text = model.config.text
        cache = KVCache.empty(text, rows, slots, model.cache_dtype or model.dtype, model.serving)
        return cls(cache, jnp.zeros((rows, text.vocab_size), bool)).constrained()

    def axes(self) -> "DecodeState":
        """Returns a tree like the state with the logical axes of each array."""
        return DecodeState(self.cache.axes(), _axes("batch", None))

    def constrained(self) -> "DecodeState":
        """Constrains every array to its axes, so that each call accepts what the previous call returned."""
        return jax.tree.map(lambda leaf, axes: constrain(leaf, *axes), self, self.axes())


Rows = jax.Array | np.ndarray | jax.ShapeDtypeStruct  # of the host, while tracing, or described


class DecodeRows(NamedTuple):
    """What the host says about each of R rows when it asks for tokens, [R] each unless another shape is given.

    Attributes:
      length: int32, the slots that are kept; the newest token follows them.
      token: int32, the newest token, which is not yet in the cache.
      active: bool, whether the row generates.
      fresh: bool, whether its answer begins: earlier ones are forgotten by the repetition penalty.
      remaining: int32, the tokens that it may still generate.
      adapter: int32, its LoRA adapter; below 0 for none.
      sampling: Settings of sampling.
      allowed: [R, ceil(V / 32)] uint32, a bit for each token that may come first (`token_masks`); any may follow.
      taken_back: [R, STEPS_PER_CALL - 1] int32, tokens of the call before that the row does not keep; V for none.
    """

    length: Rows
    token: Rows
    active: Rows
    fresh: Rows
    remaining: Rows
    adapter: Rows
    sampling: SamplingParams
    allowed: Rows
    taken_back: Rows


class PromptPart(NamedTuple):
    """C tokens of a prompt, and where they belong, in few arrays, because each is sent to the devices on its own.

    Attributes:
      tokens: [1, C] int32 token ids, below 0 at vision tokens; anything behind the last token of the prompt.
      features: [1, C, D], the vision features of these tokens; anything at other tokens.
      place: [4] int32: the row of the cache, the slots of the row that are kept, which the part follows, the tokens of
        the part that are no padding, and the LoRA adapter of the prompt, below 0 for none.
    """

    tokens: Rows
    features: Rows
    place: Rows


def _axes(*names: str | None) -> Any:
    """Returns the logical axes of an array, to stand in the array's place in a state."""
    return names


def described_state(model: VideoLLaMA3, rows: int, slots: int, mesh: Mesh | None) -> DecodeState:
    """Returns a state as `jax.ShapeDtypeStruct` leaves, sharded over a mesh as the programs return it."""
    shapes = jax.eval_shape(functools.partial(DecodeState.empty, model, rows, slots))
    if mesh is None:
        return shapes

    def sharded(leaf: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(sharded, shapes, shapes.axes())


# `keep_unused`: the compiler's memory analysis then counts all weights as arguments of every program.
@functools.partial(jax.jit, static_argnums=0, keep_unused=True)
def encode_vision(model, params, patches, patch_segment, patch_hw, token_patches):
    """Encodes images and frames into vision tokens, [1, T, D], in the model's type."""
    return encode(model, params, patches, patch_segment, patch_hw, token_patches).astype(model.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_state(model, rows, slots):
    """Creates the state of rows that hold nothing."""
    return DecodeState.empty(model, rows, slots)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def grow_state(model, rows, slots, state):
    """Returns a state with more rows or slots, in which the rows hold what they held."""
    shapes = jax.eval_shape(functools.partial(DecodeState.empty, model, rows, slots))

    def grown(leaf, shape):
        return jnp.pad(leaf, [(0, new - old) for new, old in zip(shape.shape, leaf.shape, strict=True)])

    return jax.tree.map(grown, state, shapes).constrained()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2, keep_unused=True)
def prefill(model, params, state, part):
    """Writes a part of a prompt into a row of the cache.

    Args:
      model: The model.
      params: Parameters.
      state: The `DecodeState`, which is updated in place.
      part: The `PromptPart`.

    Returns:
      The new `DecodeState`.
    """
    row, start, count, adapter = part.place
    cache, index = state.cache.truncate(row, start), jnp.arange(part.tokens.shape[1])[None]
    vision_slot, segment_ids = jnp.where(part.tokens < 0, index, -1), (index < count).astype(jnp.int32)
    tokens = part.tokens, part.features, vision_slot, segment_ids, start + index
    _, cache = decode(model, params, *tokens, cache=cache, rows=row[None], adapter=adapter[None])
    return state.replace(cache=cache).constrained()


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 9), donate_argnums=5, keep_unused=True)
def decode_steps(model, max_steps, logprobs, all_greedy, params, state, rows, stop_ids, num_steps, with_hidden=False):
    """Decodes `num_steps` <= `max_steps` tokens, or fewer once every row has stopped.

    Args:
      model: The model.
      max_steps: Columns of the results.
      logprobs: Number of top log-probabilities of each token.
      all_greedy: Whether no row has a temperature.
      params: Parameters.
      state: The `DecodeState`, which is updated in place.
      rows: The `DecodeRows`.
      stop_ids: [n] int32, the tokens that end an answer.
      num_steps: [] int32.
      with_hidden: Whether hidden states are returned.

    Returns:
      The new `DecodeState`; the tokens [R, max_steps] int32; the number of them that each row generated [R] int32; the
      hidden state [R, max_steps, D] after the final norm of what each step read, the token before the generated one, or
      None; and ids and values of the most likely tokens, [R, max_steps, logprobs] each, or None twice.
    """
    num_rows = rows.token.shape[0]
    shape = (num_rows, max_steps)
    top = (jnp.zeros((*shape, logprobs), jnp.int32), jnp.zeros((*shape, logprobs))) if logprobs else (None, None)
    states = jnp.zeros((*shape, model.config.text.hidden_size), model.dtype) if with_hidden else None
    cache = state.cache.truncate(jnp.arange(num_rows), rows.length)
    generated = state.generated & ~rows.fresh[:, None]
    generated = generated.at[jnp.arange(num_rows)[:, None], rows.taken_back].set(False, mode="drop")
    state = state.replace(cache=cache, generated=generated)
    # Behind a barrier, because the TPU compiler would unpack a part of the masks again for each token.
    allowed = jax.lax.optimization_barrier(unpack_masks(rows.allowed, generated.shape[1]))
    carry = (jnp.int32(0), state, rows.token, rows.active, jnp.zeros(num_rows, jnp.int32), jnp.zeros(shape, jnp.int32))

    def unfinished(carry):
        index, _, _, active, *_ = carry[0]
        return (index < num_steps) & jnp.any(active)

    def one_step(carry):
        (index, state, token, active, counts, tokens), states, top = carry
        position = state.cache.length[:, None]
        segment_ids = active.astype(jnp.int32)[:, None]
        text = (token[:, None], None, jnp.full_like(segment_ids, -1), segment_ids, position)
        hidden, cache = decode(model, params, *text, cache=state.cache, adapter=rows.adapter)
        if with_hidden:
            states = states.at[:, index].set(hidden[:, 0])
        logits = unembed(model, params, hidden[:, 0])
        is_allowed = allowed | (index > 0)
        new = sample_tokens(logits, state.generated, position[:, 0] + 1, rows.sampling, all_greedy, is_allowed)
        token = jnp.where(active, new, token)
        generated = state.generated.at[jnp.arange(num_rows), token].max(active)
        if logprobs:
            values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), logprobs)
            top = (top[0].at[:, index].set(ids), top[1].at[:, index].set(values))
        counts = counts + active
        tokens = tokens.at[:, index].set(token)
        active = active & ~jnp.isin(token, stop_ids) & (counts < rows.remaining)
        return (index + 1, state.replace(cache=cache, generated=generated), token, active, counts, tokens), states, top

    (_, state, _, _, counts, tokens), states, top = jax.lax.while_loop(unfinished, one_step, (carry, states, top))
    return state.constrained(), tokens, counts, states, *top
