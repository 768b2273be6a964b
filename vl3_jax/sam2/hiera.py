"""The Hiera trunk: attention in windows, a few blocks over the whole map, and pooling between four stages.

No block but those of windows depends on the order of the cells. A map therefore stays cut into windows from block to
block, as long as these tile it; a window that is pooled often is the next stage's.

Dimension names: B images, H and W rows and columns of a map, C channels.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.einsum import einsum
from vl3_jax.model.attention import attention
from vl3_jax.model.layers import ACTIVATIONS, LayerNorm, Linear, partitioned_param
from vl3_jax.parallel.rules import constrain
from vl3_jax.processing.resampling import bicubic_matrix
from vl3_jax.sam2.sam2_config import PATCH_KERNEL, PATCH_PADDING, PATCH_STRIDE, RGB, STAGES, HieraConfig
from vl3_jax.sam2.sam2_layers import Conv, all_to_all_attention, all_tokens

Map = Float[Array, "B H W C"]
_MANY = 512  # tokens, whose scores are not held in memory


class Hiera(nn.Module):
    """Trunk of the image encoder."""

    config: HieraConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "B height width 3"]) -> list[Map]:
        """Returns the output of each stage, with strides 4, 8, 16 and 32, for normalised pixels."""
        config = self.config
        shape = (PATCH_KERNEL, PATCH_KERNEL, RGB, config.widths[0])
        x = Conv(shape, PATCH_STRIDE, PATCH_PADDING, param_dtype=self.param_dtype, name="patch_embed")(pixels)
        x += self._positions(x.shape[1]).astype(x.dtype)
        stages, number, side = [], 0, x.shape[1]
        for stage in range(STAGES):
            for index in range(config.depths[stage]):
                first = index == 0 and stage > 0
                window = 0 if number in config.global_blocks else config.windows[stage - first]
                x = regroup(x, side, window) if window else x
                x = HieraBlock(config, stage, side, window, first, self.param_dtype, name=f"block{number}")(x)
                number, side = number + 1, side >> first
            stages.append(join_windows(x, side))
        return stages

    def _positions(self, side: int) -> Float[Array, "side side C"]:
        """Returns the interpolated position embedding of the map plus that of each window of the first stage."""
        config, width, init = self.config, self.config.widths[0], nn.initializers.normal(0.02)
        shape, window, axes = (*config.position_size, width), config.windows[0], (None, None, "vision_embed")
        coarse = partitioned_param(self, "position", init, shape, axes, self.param_dtype)
        fine = partitioned_param(self, "window_position", init, (window, window, width), axes, self.param_dtype)
        rows, columns = (jnp.asarray(bicubic_matrix(size, side)) for size in config.position_size)
        coarse = einsum("yi,ijc,xj->yxc", rows, coarse.astype(jnp.float32), columns)
        return coarse + jnp.tile(fine.astype(jnp.float32), (side // window, side // window, 1))


class HieraBlock(nn.Module):
    """Pre-norm transformer block over a map, which may be cut into windows already.

    Attributes:
      config: Configuration of the trunk.
      stage: Stage of the block, from 0.
      side: Rows, and columns, of the map.
      window: Rows, and columns, of its windows; 0 attends to the whole map.
      pool: Whether it begins a stage: it changes the width and halves the map.
      param_dtype: Dtype of the parameters.
    """

    config: HieraConfig
    stage: int
    side: int
    window: int
    pool: bool
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Map) -> Map:
        width, inner = self.config.widths[self.stage], self.config.mlp_width(self.stage)
        norm = functools.partial(LayerNorm, self.config.layer_norm_eps, "vision_embed", self.param_dtype)
        linear = functools.partial(Linear, param_dtype=self.param_dtype)
        normed = norm(name="ln1")(x)
        if self.pool:
            shape, axes = (x.shape[-1], width), ("vision_embed", "vision_mlp")
            x = max_pool(linear(shape, axes, name="shortcut")(normed))
        x += self._attend(normed)
        hidden = linear((width, inner), ("vision_embed", "vision_mlp"), name="fc1")(norm(name="ln2")(x))
        x += linear((inner, width), ("vision_mlp", "vision_embed"), name="fc2")(ACTIVATIONS["gelu"](hidden))
        return constrain(x, "batch", None, None, None)

    def _attend(self, x: Map) -> Map:
        """Attends within windows, whose padding takes part; queries are pooled after their projection."""
        width, heads = self.config.widths[self.stage], self.config.heads[self.stage]
        side, cells = x.shape[1], (self.window or self.side) ** 2
        x = x if self.window in (0, side) else split_windows(x, self.window)
        shape, axes = (x.shape[-1], 3, heads, width // heads), ("vision_embed", None, "vision_heads", "head_dim")
        qkv = Linear(shape, axes, param_dtype=self.param_dtype, name="qkv")(x)
        q, k, v = (qkv[..., part, :, :] for part in range(3))
        if self.pool:
            q = max_pool(q.reshape(*q.shape[:3], width))
        shape = q.shape[:3]
        q = q.reshape(-1, cells >> 2 * self.pool, heads, width // heads)
        k, v = (part.reshape(-1, cells, heads, width // heads) for part in (k, v))
        out = _attention(q, k, v).reshape(*shape, heads, width // heads)
        axes = ("vision_heads", "head_dim", "vision_embed")
        out = Linear((*out.shape[3:], width), axes, num_in=2, param_dtype=self.param_dtype, name="out")(out)
        return join_windows(out, side >> self.pool)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attends between all cells of a row, [B, L, H, D]; block by block where they are many."""
    if k.shape[1] < _MANY:
        return all_to_all_attention(q, k, v)
    q_info, kv_info = all_tokens(q), all_tokens(k)
    return attention(AttentionInputs(q, k, v, q_info, kv_info, causal=False, scale=q.shape[-1] ** -0.5))


def max_pool(x: Map) -> Map:
    """Returns the largest value in each 2 x 2 cells."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def regroup(x: Map, side: int, window: int) -> Map:
    """Cuts maps of `side` rows and columns into windows that tile them; the order of the cells is new, not they.

    Args:
      x: Maps, or windows of another size that tile them.
      side: Rows, and columns, of a map.
      window: Rows, and columns, of a window; where it does not divide `side`, whole maps are returned.
    """
    window = window if side % window == 0 else side
    return x if x.shape[1] == window else split_windows(join_windows(x, side), window)


def split_windows(x: Map, window: int) -> Float[Array, "windows window window C"]:
    """Splits square maps into windows, padded with zeros below and on the right."""
    batch, side, _, channels = x.shape
    count = -(-side // window)
    missing = count * window - side
    x = jnp.pad(x, [(0, 0), (0, missing), (0, missing), (0, 0)])
    return x.reshape(batch, count, window, count, window, channels).swapaxes(2, 3).reshape(-1, window, window, channels)


def join_windows(windows: Float[Array, "windows window window C"], side: int) -> Map:
    """Inverts `split_windows` for maps of `side` rows and columns."""
    _, window, _, channels = windows.shape
    count = -(-side // window)
    x = windows.reshape(-1, count, count, window, window, channels).swapaxes(2, 3)
    return x.reshape(-1, count * window, count * window, channels)[:, :side, :side]
