"""The Qwen2.5 decoder, over packed rows or against a cache.

Dimension names: B rows, L tokens, D width, H query heads, K key/value heads, S cache slots.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.decode_inputs import DecodeSchedule, flat, join_heads, split_heads
from vl3_jax.kernels.einsum import tied_product
from vl3_jax.kernels.int8_product import int8_product
from vl3_jax.kernels.keys_values import KeysValues
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model.adapters import add_adapter_products
from vl3_jax.model.attention import attention, cache_schedule, cached_attention
from vl3_jax.model.cache import KVCache
from vl3_jax.model.config import TextConfig
from vl3_jax.model.layers import ACTIVATIONS, Linear, RMSNorm, partitioned_param
from vl3_jax.model.lookup import TABLE_AXES, lookup
from vl3_jax.model.remat import apply_layer, scan_layers
from vl3_jax.model.rope import rotary_table
from vl3_jax.parallel.rules import Grouped, constrain, constrain_tokens

TOKEN_AXES = ("batch", "length")


class DecoderLayerInputs(NamedTuple):
    """The inputs that all layers of the decoder share.

    Attributes:
      rotary: Rotary table of the tokens, [B, L, head_dim] float32.
      q_info: Segments and positions of the tokens, [B, L].
      kv_info: Segments and positions of what the tokens attend to: [B, L], the tokens themselves, or [B, S], the slots
        of the cache.
      cached: Keys and values of all layers, or of a layer for serving; None without a cache.
      rows: Row of the cache of each row of tokens, [B] int32; None where they are the same.
      schedule: Which slots a few tokens attend to; None of many tokens, and without a cache.
      adapter: LoRA adapter of each row, [B] int32, below 0 for none; None for no row.
    """

    rotary: Float32[Array, "B L head_dim"]
    q_info: SegmentInfo
    kv_info: SegmentInfo
    cached: KeysValues | None = None
    rows: Int32[Array, " B"] | None = None
    schedule: DecodeSchedule | None = None
    adapter: Int32[Array, " B"] | None = None


class Decoder(nn.Module):
    """Token embedding, transformer layers, final norm and output head.

    `serving` is whether the parameters are in the layout for serving, see `vl3_jax.model.serving_layout`.
    """

    config: TextConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    serving: bool = False

    def setup(self):
        config = self.config
        self.embed = Embedding(config, self.param_dtype)
        layer = functools.partial(DecoderLayer, config, self.param_dtype, self.serving)
        if self.serving:
            self.layers = [layer() for _ in range(config.num_layers)]
        else:
            scanned = scan_layers(DecoderLayer, self.remat, config.num_layers, nn.broadcast)
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
        adapter: Int32[Array, " B"] | None = None,
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
        shared = DecoderLayerInputs(rotary, info, info, adapter=adapter)
        if cache is None:
            return self.norm(self._run_layers(x, shared, None)[0]), None
        keys_values, kv_info = cache.keys_values, cache.info(rows)
        first = keys_values[0] if isinstance(keys_values, tuple) else keys_values
        schedule = cache_schedule(info, kv_info, first, rows)
        shared = shared._replace(kv_info=kv_info, rows=rows, schedule=schedule)
        cache, slots = cache.reserve_slots(info, rows)
        x, new = self._run_layers(x, shared, keys_values)
        if isinstance(new, list):
            slots = _after(slots, new[-1])
        return self.norm(x), cache.write(rows, slots, new)

    def _run_layers(
        self, x: Float[Array, "B L D"], shared: DecoderLayerInputs, cached: KeysValues | tuple[KeysValues, ...] | None
    ) -> tuple[Float[Array, "B L D"], Any]:
        """Returns the output of the last layer; with a cache also the keys and values that `KVCache.write` takes."""
        if not isinstance(self.layers, tuple | list):
            (x, _), new = self.layers((x, jnp.int32(0)), shared._replace(cached=cached))
            return x, new
        layer_cache = cached if isinstance(cached, tuple) else (None,) * len(self.layers)
        new = []
        for layer, own in zip(self.layers, layer_cache, strict=True):
            (x, _), written = apply_layer(layer, (x, jnp.int32(0)), shared._replace(cached=own))
            new.append(None if written is None else written[None])
        return x, new

    def unembed(self, hidden: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        """Implements `vl3_jax.model.unembed`."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden).astype(jnp.float32)
        if self.has_variable("params", "tied_head"):
            head = self.get_variable("params", "tied_head")
            return int8_product(hidden, head.values, 1) * head.scale.squeeze(-1)
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
    def __call__(self, carry: tuple[Float[Array, "B L D"], Int32[Array, ""]], shared: DecoderLayerInputs):
        x, layer = carry
        norm = functools.partial(RMSNorm, self.config.rms_norm_eps, "embed", self.param_dtype)
        attn = DecoderAttention(self.config, self.param_dtype, self.fused, name="attn")
        out, new = attn(norm(name="ln_attn")(x), layer, shared)
        x += out
        mlp = DecoderMLP(self.config, self.param_dtype, self.fused, name="mlp")
        x += mlp(norm(name="ln_mlp")(x), shared.adapter)
        x = constrain_tokens(x, *TOKEN_AXES, None)
        self.sow("intermediates", "out", x)
        return (x, layer + 1), new


class DecoderAttention(nn.Module):
    """Causal attention within a segment, over the packed row, or over the new tokens and a cache."""

    config: TextConfig
    param_dtype: DTypeLike = jnp.float32
    fused: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], layer: Int32[Array, ""], shared: DecoderLayerInputs
    ) -> tuple[Float[Array, "B L D"], jax.Array | None]:
        """Returns the output, and with a cache what `KVCache.write` takes of this layer."""
        qkv = self._project(x, shared.adapter, joined=shared.cached is not None)
        with jax.named_scope("attention"):
            if shared.cached is not None:
                infos, where = (shared.q_info, shared.kv_info), (layer, shared.rows, shared.schedule)
                out, new = cached_attention(qkv, shared.rotary, infos, shared.cached, *where)
                return self._project_out(out, shared.adapter), new
            q, k, v = qkv
            options = {"causal": True, "scale": self.config.head_dim**-0.5, "rotary": shared.rotary}
            out = attention(AttentionInputs(q, k, v, shared.q_info, shared.kv_info, **options))
        return self._project_out(flat(out), shared.adapter), None

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Key/value heads, queries of a group, and channels of a head."""
        return self.config.num_kv_heads, self.config.num_heads // self.config.num_kv_heads, self.config.head_dim

    def _project_out(self, out: Float[Array, "B L N"], adapter: Int32[Array, " B"] | None) -> Float[Array, "B L D"]:
        config = self.config
        linear = functools.partial(Linear, use_bias=False, param_dtype=self.param_dtype, name="out")
        if self.fused:
            shape, axes = (out.shape[-1], config.hidden_size), (Grouped("heads", config.num_kv_heads), "embed")
            product = linear(shape, axes)(out)
        else:
            shape, axes = (config.num_heads, config.head_dim, config.hidden_size), ("heads", "head_dim", "embed")
            product = linear(shape, axes, num_in=2)(out.reshape(*out.shape[:-1], *shape[:2]))
        return add_adapter_products(self, product, out, adapter, ["out"])

    def _project(self, x: Float[Array, "B L D"], adapter: Int32[Array, " B"] | None, joined: bool) -> Any:
        """Returns queries [B, L, H, head_dim], and keys and values [B, L, K, head_dim]; or all of them `joined`."""
        config, linear = self.config, functools.partial(Linear, param_dtype=self.param_dtype)
        kv_heads, group, head_dim = self._sizes
        if self.fused:
            shape = (kv_heads * (group + 2) * head_dim, config.hidden_size)
            qkv = linear(shape, (Grouped("kv_heads", kv_heads), "embed"), transposed=True, name="qkv")(x)
            qkv = add_adapter_products(self, qkv, x, adapter, ["q", "k", "v"], join_heads)
            return qkv if joined else split_heads(qkv, kv_heads, group, head_dim)

        def projected(name: str, heads: int, axis: str) -> jax.Array:
            return linear((config.hidden_size, heads, head_dim), ("embed", axis, "head_dim"), name=name)(x)

        parts = projected("q", config.num_heads, "heads"), *(projected(name, kv_heads, "kv_heads") for name in "kv")
        return join_heads(*parts) if joined else parts


class DecoderMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: TextConfig
    param_dtype: DTypeLike = jnp.float32
    fused: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], adapter: Int32[Array, " B"] | None) -> Float[Array, "B L D"]:
        width, inner, act = self.config.hidden_size, self.config.intermediate_size, ACTIVATIONS["silu"]
        linear = functools.partial(Linear, use_bias=False, param_dtype=self.param_dtype)
        if self.fused:
            groups = gate_groups(self.config)
            axes = Grouped("mlp", groups), "embed"
            gate_up = linear((2 * inner, width), axes, transposed=True, name="gate_up")(x)
            join = functools.partial(_join_gate_up, groups)
            gate_up = add_adapter_products(self, gate_up, x, adapter, ["gate", "up"], join)
            # Slices, because a reshaped product would be made of a copy of the kernel on a TPU.
            parts = jnp.split(gate_up, 2 * groups, axis=-1)
            hidden = jnp.concatenate(
                [act(gate) * up for gate, up in zip(parts[::2], parts[1::2], strict=True)], axis=-1
            )
        else:
            gate, up = (linear((width, inner), ("embed", "mlp"), name=name)(x) for name in ("gate", "up"))
            hidden = act(gate) * up
        product = linear((inner, width), ("mlp", "embed"), name="down")(hidden)
        return add_adapter_products(self, product, hidden, adapter, ["down"])


def _join_gate_up(groups: int, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Joins parts of `gate` and of `up`, [..., F] each, as a fused kernel does: [..., 2 * F]."""
    lead = gate.shape[:-1]
    parts = [x.reshape(*lead, groups, -1) for x in (gate, up)]
    return jnp.concatenate(parts, axis=-1).reshape(*lead, -1)


def gate_groups(config: TextConfig) -> int:
    """Returns how many times a part of `gate` and one of `up` follow each other in a fused kernel.

    Both parts of a group are on one chip. There are as many as key/value heads, over which chips are split, too.
    """
    return math.gcd(config.intermediate_size, config.num_kv_heads)


def _after(slots: Int32[Array, "B L"], last: jax.Array) -> Int32[Array, "B L"]:
    """Returns the slots, unchanged, which the compiler then takes to depend on what the last layer writes.

    So every layer's cache is read before any is written. Where nothing says which comes first, XLA copies each whole
    cache in front of the writes, which takes longer than reading a prompt of a small model.
    """
    return slots + (last.reshape(-1)[0].astype(jnp.float32) * 0).astype(jnp.int32)
