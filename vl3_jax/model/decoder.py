"""The Qwen2.5 decoder, over packed rows or against a cache.

Dimension names: B rows, L tokens, D width, H query heads, K key/value heads, S cache slots.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.rotary import rotate
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model.attention import attention
from vl3_jax.model.cache import KVCache, write_layer
from vl3_jax.model.config import TextConfig
from vl3_jax.model.layers import ACTIVATIONS, Linear, RMSNorm, partitioned_param
from vl3_jax.model.lookup import TABLE_AXES, lookup
from vl3_jax.model.remat import scan_layers
from vl3_jax.model.rope import rotary_table
from vl3_jax.parallel.rules import constrain

TOKEN_AXES = ("batch", "length")


class DecoderLayerInputs(NamedTuple):
    """The inputs that all layers of the decoder share.

    Attributes:
      rotary: Rotary table of the tokens, [B, L, head_dim] float32.
      q_info: Segments and positions of the tokens, [B, L].
      kv_info: Segments and positions of what the tokens attend to: [B, L], the tokens themselves, or [B, S], the slots
        of the cache.
      slots: Slot that each token is written to, [B, L] int32; None without a cache.
    """

    rotary: Float32[Array, "B L head_dim"]
    q_info: SegmentInfo
    kv_info: SegmentInfo
    slots: Int32[Array, "B L"] | None


class Decoder(nn.Module):
    """Token embedding, transformer layers, final norm and output head."""

    config: TextConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"

    def setup(self):
        config = self.config
        self.embed = Embedding(config, self.param_dtype)
        layers = scan_layers(DecoderLayer, self.remat, config.num_layers, (0, nn.broadcast))
        self.layers = layers(config, self.param_dtype)
        self.norm = RMSNorm(config.rms_norm_eps, "embed", self.param_dtype)
        if not config.tie_word_embeddings:
            shape = (config.hidden_size, config.vocab_size)
            self.lm_head = Linear(shape, ("embed", "vocab"), use_bias=False, param_dtype=self.param_dtype)

    def __call__(
        self,
        tokens: Int32[Array, "B L"],
        features: Float[Array, "B T D"] | None,
        vision_slot: Int32[Array, "B L"],
        segment_ids: Int32[Array, "B L"],
        positions: Int32[Array, "B L"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        """Implements `vl3_jax.model.decode`, which describes the arguments."""
        with jax.named_scope("embed"):
            if features is not None:
                tokens = jnp.where(vision_slot >= 0, -1, tokens)
            x = self.embed(tokens, self.dtype)
            if features is not None:
                gather = jax.vmap(lambda row, index: jnp.take(row, index, axis=0, mode="clip"))
                x = jnp.where(vision_slot[..., None] >= 0, gather(features, vision_slot).astype(x.dtype), x)
            x = constrain(x, *TOKEN_AXES, None)
        info = kv_info = SegmentInfo(segment_ids, positions)
        keys_values = slots = None
        if cache is not None:
            cache, slots = cache.reserve_slots(info)
            keys_values, kv_info = (cache.keys, cache.values), SegmentInfo(cache.segment_ids, cache.positions)
        rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        shared = DecoderLayerInputs(rotary, info, kv_info, slots)
        (x, keys_values), _ = self.layers((x, keys_values), jnp.arange(self.config.num_layers), shared)
        if cache is not None:
            cache = cache.replace(keys=keys_values[0], values=keys_values[1])
        return self.norm(x), cache

    def unembed(self, hidden: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        """Implements `vl3_jax.model.unembed`."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden).astype(jnp.float32)
        table = self.embed.embedding.astype(hidden.dtype)
        return einsum("...d,vd->...v", hidden, table, out_dtype=jnp.float32)


class Embedding(nn.Module):
    """Token embeddings, which are also the output head of a model with tied embeddings."""

    config: TextConfig
    param_dtype: DTypeLike = jnp.float32

    def setup(self):
        init, shape = nn.initializers.normal(0.02), (self.config.vocab_size, self.config.hidden_size)
        self.embedding = partitioned_param(self, "embedding", init, shape, TABLE_AXES, self.param_dtype)

    def __call__(self, tokens: Int32[Array, "B L"], dtype: DTypeLike) -> Float[Array, "B L D"]:
        return lookup(self.embedding, tokens, dtype)


class DecoderLayer(nn.Module):
    """Pre-norm transformer block: grouped-query attention with biases on q, k and v, and SwiGLU without biases."""

    config: TextConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, carry, layer: Int32[Array, ""], shared: DecoderLayerInputs):
        x, keys_values = carry
        norm = functools.partial(RMSNorm, self.config.rms_norm_eps, "embed", self.param_dtype)
        attn = DecoderAttention(self.config, self.param_dtype, name="attn")
        out, keys_values = attn(norm(name="ln_attn")(x), keys_values, layer, shared)
        x += out
        mlp = DecoderMLP(self.config, self.param_dtype, name="mlp")
        x += mlp(norm(name="ln_mlp")(x))
        x = constrain(x, *TOKEN_AXES, None)
        self.sow("intermediates", "out", x)
        return (x, keys_values), None


class DecoderAttention(nn.Module):
    """Causal attention within a segment, over the packed row or over the cache that the new tokens are written to."""

    config: TextConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], keys_values, layer: Int32[Array, ""], shared: DecoderLayerInputs):
        heads, kv_heads, head_dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q = self._project(x, "q", heads, "heads")
        k, v = (self._project(x, name, kv_heads, "kv_heads") for name in "kv")
        rotary = shared.rotary
        if shared.slots is not None:
            q, k, rotary = rotate(q, rotary), rotate(k, rotary), None
            k, v = keys_values = tuple(
                write_layer(cache, layer, shared.slots, new) for cache, new in zip(keys_values, (k, v), strict=True)
            )
        with jax.named_scope("attention"):
            infos, scale = (shared.q_info, shared.kv_info), head_dim**-0.5
            inputs = AttentionInputs(q, k, v, *infos, causal=True, scale=scale, rotary=rotary)
            out = attention(inputs, layer=None if shared.slots is None else layer)
        shape, axes = (heads, head_dim, self.config.hidden_size), ("heads", "head_dim", "embed")
        out = Linear(shape, axes, num_in=2, use_bias=False, param_dtype=self.param_dtype, name="out")(out)
        return out, keys_values

    def _project(self, x: Float[Array, "B L D"], name: str, heads: int, axis: str) -> jax.Array:
        shape = (self.config.hidden_size, heads, self.config.head_dim)
        return Linear(shape, ("embed", axis, "head_dim"), param_dtype=self.param_dtype, name=name)(x)


class DecoderMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: TextConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        width, inner = self.config.hidden_size, self.config.intermediate_size
        linear = functools.partial(Linear, use_bias=False, param_dtype=self.param_dtype)
        gate, up = (linear((width, inner), ("embed", "mlp"), name=name)(x) for name in ("gate", "up"))
        return linear((inner, width), ("mlp", "embed"), name="down")(ACTIVATIONS["silu"](gate) * up)
