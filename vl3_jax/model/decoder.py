"""The Qwen2.5 decoder, over packed rows or against a cache.

Dimension names: B rows, L tokens, D width, H query heads, K key/value heads, S cache slots.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.decode_inputs import DecodeSchedule
from vl3_jax.kernels.einsum import tied_product
from vl3_jax.kernels.keys_values import KeysValues
from vl3_jax.kernels.rotary import rotate
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model.attention import attention, cache_schedule, cached_attention
from vl3_jax.model.cache import KVCache
from vl3_jax.model.config import TextConfig
from vl3_jax.model.layers import ACTIVATIONS, Linear, RMSNorm, partitioned_param
from vl3_jax.model.lookup import TABLE_AXES, lookup
from vl3_jax.model.remat import SEPARATE, scan_layers
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
      rows: Row of the cache of each row of tokens, [B] int32; None where they are the same.
      schedule: Which slots a few tokens attend to; None of many tokens, and without a cache.
    """

    rotary: Float32[Array, "B L head_dim"]
    q_info: SegmentInfo
    kv_info: SegmentInfo
    slots: Int32[Array, "B L"] | None = None
    rows: Int32[Array, " B"] | None = None
    schedule: DecodeSchedule | None = None


class Decoder(nn.Module):
    """Token embedding, transformer layers, final norm and output head.

    `serving` is the layout of the parameters, see `vl3_jax.model.serving_layout`; None is that of training.
    """

    config: TextConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    serving: str | None = None

    def setup(self):
        config = self.config
        self.embed = Embedding(config, self.param_dtype)
        layer = functools.partial(DecoderLayer, config, self.param_dtype, self.serving is not None)
        if self.serving == SEPARATE:
            self.layers = [layer() for _ in range(config.num_layers)]
        else:
            scanned = scan_layers(DecoderLayer, self.remat, config.num_layers, (0, nn.broadcast))
            self.layers = scanned(*layer.args)
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
        rows: Int32[Array, " B"] | None = None,
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
        info = SegmentInfo(segment_ids, positions)
        rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        shared = DecoderLayerInputs(rotary, info, info)
        keys_values = None
        if cache is not None:
            cache, slots = cache.reserve_slots(info, rows)
            keys_values, kv_info = cache.keys_values, cache.info(rows)
            first = keys_values[0] if isinstance(keys_values, tuple) else keys_values
            schedule = cache_schedule(info, kv_info, first, rows)
            shared = DecoderLayerInputs(rotary, info, kv_info, slots, rows, schedule)
        x, keys_values = self._run_layers(x, keys_values, shared)
        return self.norm(x), None if cache is None else cache.replace(keys_values=keys_values)

    def _run_layers(self, x: Float[Array, "B L D"], keys_values: Any, shared: DecoderLayerInputs) -> tuple:
        """Returns the output of the last layer, and the keys and values with those of the new tokens."""
        if self.serving != SEPARATE:
            carry, _ = self.layers((x, keys_values), jnp.arange(self.config.num_layers), shared)
            return carry
        layer_keys_values = []
        for index, layer in enumerate(self.layers):
            (x, new), _ = layer((x, keys_values and keys_values[index]), jnp.int32(0), shared)
            layer_keys_values.append(new)
        return x, keys_values and tuple(layer_keys_values)

    def unembed(self, hidden: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        """Implements `vl3_jax.model.unembed`."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden).astype(jnp.float32)
        return tied_product(hidden, self.embed.embedding)


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
    """Pre-norm transformer block: grouped-query attention with biases on q, k and v, and SwiGLU without biases.

    `fused` is whether products of the same input are one: q, k and v, and gate and up.
    """

    config: TextConfig
    param_dtype: DTypeLike = jnp.float32
    fused: bool = False

    @nn.compact
    def __call__(self, carry, layer: Int32[Array, ""], shared: DecoderLayerInputs):
        x, keys_values = carry
        norm = functools.partial(RMSNorm, self.config.rms_norm_eps, "embed", self.param_dtype)
        attn = DecoderAttention(self.config, self.param_dtype, self.fused, name="attn")
        out, keys_values = attn(norm(name="ln_attn")(x), keys_values, layer, shared)
        x += out
        mlp = DecoderMLP(self.config, self.param_dtype, self.fused, name="mlp")
        x += mlp(norm(name="ln_mlp")(x))
        x = constrain(x, *TOKEN_AXES, None)
        self.sow("intermediates", "out", x)
        return (x, keys_values), None


class DecoderAttention(nn.Module):
    """Causal attention within a segment, over the packed row or over the cache that the new tokens are written to."""

    config: TextConfig
    param_dtype: DTypeLike = jnp.float32
    fused: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        keys_values: KeysValues | None,
        layer: Int32[Array, ""],
        shared: DecoderLayerInputs,
    ):
        heads, head_dim = self.config.num_heads, self.config.head_dim
        q, k, v = self._project(x)
        infos, scale = (shared.q_info, shared.kv_info), head_dim**-0.5
        if keys_values is not None:
            q, k = rotate(q, shared.rotary), rotate(k, shared.rotary)
            keys_values = keys_values.write(layer, shared.rows, shared.slots, k, v)
        with jax.named_scope("attention"):
            if keys_values is None:
                out = attention(AttentionInputs(q, k, v, *infos, causal=True, scale=scale, rotary=shared.rotary))
            else:
                out = cached_attention(q, keys_values, layer, shared.rows, infos, shared.schedule, scale)
        shape, axes = (heads, head_dim, self.config.hidden_size), ("heads", "head_dim", "embed")
        out = Linear(shape, axes, num_in=2, use_bias=False, param_dtype=self.param_dtype, name="out")(out)
        return out, keys_values

    def _project(self, x: Float[Array, "B L D"]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [B, L, H, head_dim], and keys and values [B, L, K, head_dim]."""
        config, linear = self.config, functools.partial(Linear, param_dtype=self.param_dtype)
        kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
        if self.fused:
            shape = (config.hidden_size, kv_heads, group + 2, config.head_dim)
            qkv = linear(shape, ("embed", "kv_heads", None, "head_dim"), name="qkv")(x)
            q = qkv[..., :group, :].reshape(*x.shape[:-1], config.num_heads, config.head_dim)
            return q, qkv[..., group, :], qkv[..., group + 1, :]

        def projected(name: str, heads: int, axis: str) -> jax.Array:
            shape = (config.hidden_size, heads, config.head_dim)
            return linear(shape, ("embed", axis, "head_dim"), name=name)(x)

        return projected("q", config.num_heads, "heads"), *(projected(name, kv_heads, "kv_heads") for name in "kv")


class DecoderMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: TextConfig
    param_dtype: DTypeLike = jnp.float32
    fused: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        width, inner = self.config.hidden_size, self.config.intermediate_size
        linear = functools.partial(Linear, use_bias=False, param_dtype=self.param_dtype)
        if self.fused:
            gate_up = linear((width, 2, inner), ("embed", None, "mlp"), name="gate_up")(x)
            gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
        else:
            gate, up = (linear((width, inner), ("embed", "mlp"), name=name)(x) for name in ("gate", "up"))
        return linear((inner, width), ("mlp", "embed"), name="down")(ACTIVATIONS["silu"](gate) * up)
