"""The Hiera trunk: attention in windows, a few blocks over the whole map, and pooling between four stages.

No block but those of windows depends on the order of the cells. They therefore stay in the order of windows from block
to block, as long as these tile the map; a window that is pooled often is the next stage's. Windows come in the order of
larger ones, if a later stage has these: then no cell is moved between the first block and the last.

Dimension names: B images, H and W rows and columns of a map, N cells of a map, C channels.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model.attention import attention
from vl3_jax.model.layers import LayerNorm, Linear, partitioned_param
from vl3_jax.model.linear import add_bias, linear
from vl3_jax.parallel.rules import constrain_row_major, target_device
from vl3_jax.processing.resampling import bicubic_matrix
from vl3_jax.sam2.cell_order import Cells, Groups, Map, cells_of, map_of, max_pool
from vl3_jax.sam2.sam2_config import PATCH_KERNEL, PATCH_STRIDE, RGB, STAGES, HieraConfig
from vl3_jax.sam2.sam2_layers import all_to_all_attention, gelu

_MANY = 512  # cells, whose scores are not held in memory
_ROW = 256  # cells of a row of windows, as in a block of the kernels


class Stage(NamedTuple):
    """Output of a stage.

    Attributes:
      cells: Features of each cell, [B, N, C].
      side: Rows, and columns, of the map.
      groups: Order of the cells, see `cells_of`.
    """

    cells: Cells
    side: int
    groups: Groups

    def maps(self, cells: Cells | None = None) -> Map:
        """Returns the maps of these cells, or of what was made of each of them."""
        return map_of(self.cells if cells is None else cells, self.side, self.groups)


class Hiera(nn.Module):
    """Trunk of the image encoder."""

    config: HieraConfig
    param_dtype: DTypeLike = jnp.float32

    def setup(self):
        width, window, init = self.config.widths[0], self.config.windows[0], nn.initializers.normal(0.02)
        parameter = lambda name, *shape: partitioned_param(  # noqa: E731
            self, name, init, (*shape, width), (None, None, "vision_embed"), self.param_dtype
        )
        self.position = parameter("position", *self.config.position_size)
        self.window_position = parameter("window_position", window, window)

    @nn.compact
    def __call__(self, pixels: Float[Array, "B height width 3"], positions: Float[Array, "N C"]) -> list[Stage]:
        """Returns the output of each stage, with strides 4, 8, 16 and 32.

        Args:
          pixels: Normalised pixels.
          positions: From `positions`, which do not depend on the images.
        """
        config = self.config
        x = PatchEmbed(config.widths[0], self.param_dtype, name="patch_embed")(pixels)
        stages, number, side = [], 0, x.shape[1]
        groups = self._first_groups(side)
        x = cells_of(x, groups) + positions.astype(x.dtype)
        x = constrain_row_major(x, "batch", None, None)
        for stage in range(STAGES):
            for index in range(config.depths[stage]):
                first = index == 0 and stage > 0
                window = 0 if number in config.global_blocks else config.windows[stage - first]
                wanted = groups if window == 0 or window in groups else (window,)
                if window and side % window:
                    wanted = (side,)
                if groups != wanted:
                    x, groups = cells_of(map_of(x, side, groups), wanted), wanted
                block = HieraBlock(config, stage, side, groups, window, first, self.param_dtype, name=f"block{number}")
                x, number = block(x), number + 1
                if first:
                    side //= 2
                    groups = tuple(group // 2 for group in groups if group > 2) or (side,)
            stages.append(Stage(x, side, groups))
        return stages

    def positions(self, side: int) -> Float[Array, "N C"]:
        """Returns the interpolated position embedding of a map plus that of each window of the first stage.

        Args:
          side: Rows, and columns, of the map.

        Returns:
          The positions of the cells, in the order of the trunk.
        """
        window, groups = self.config.windows[0], self._first_groups(side)
        rows, columns = (jnp.asarray(bicubic_matrix(size, side)) for size in self.config.position_size)
        coarse = einsum("yi,ijc,xj->yxc", rows, self.position.astype(jnp.float32), columns)
        fine = self.window_position.astype(jnp.float32).reshape(window**2, -1)
        return cells_of(coarse[None], groups)[0] + jnp.tile(fine, ((side // window) ** 2, 1))

    def _first_groups(self, side: int) -> Groups:
        """Returns the order of the cells at first: by the windows of the first stage, within those of the third one."""
        window, later = self.config.windows[0], 4 * self.config.windows[2]  # it has a quarter of the rows
        return (window,) if side % later or later % window or later == window else (later, window)


class PatchEmbed(nn.Module):
    """Convolution of pixels whose stride is the side of a patch; an output reads its patch and those before it.

    It is a product of patches, with what they read of the patches before them. A TPU lays few channels out as planes; a
    convolution would first give each pixel a register. The columns of patches are gathered by a product too.

    Attributes:
      width: Channels of the outputs.
      param_dtype: Dtype of the parameters.
    """

    width: int
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "B height columns 3"]) -> Map:
        shape, axes = (PATCH_KERNEL, PATCH_KERNEL, RGB, self.width), (None, None, None, "vision_embed")
        init, zeros = nn.initializers.normal(math.prod(shape[:3]) ** -0.5), nn.initializers.zeros
        kernel = partitioned_param(self, "kernel", init, shape, axes, self.param_dtype).astype(pixels.dtype)
        bias = partitioned_param(self, "bias", zeros, shape[3:], axes[3:], self.param_dtype)
        batch, height, columns, _ = pixels.shape
        side, rows, cells = PATCH_STRIDE, height // PATCH_STRIDE, columns // PATCH_STRIDE
        # Columns of the patch before each patch, zeros at first, and of the patch itself; those of all patches that are
        # first in theirs come before the second ones.
        read = np.arange(-side, columns).reshape(-1, side)
        read = np.stack([read[:-1], read[1:]]).transpose(0, 2, 1).reshape(-1)
        chosen = jnp.asarray(read[:, None] == np.arange(columns), pixels.dtype)
        x = einsum("bhwc,sw->bchs", pixels, chosen)
        x = x.reshape(batch, RGB, rows, side, 2 * side, cells).swapaxes(1, 2).reshape(batch, rows, -1, cells)
        above = jnp.pad(x, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :-1]
        kernel = jnp.pad(kernel, [(1, 0), (1, 0), (0, 0), (0, 0)]).reshape(2, side, 2 * side, RGB, self.width)
        kernel = kernel.transpose(0, 3, 1, 2, 4).reshape(-1, self.width)
        product = einsum("byix,io->byxo", jnp.concatenate([above, x], axis=2), kernel, out_dtype=jnp.float32)
        return (product + bias.astype(jnp.float32)).astype(pixels.dtype)


class HieraBlock(nn.Module):
    """Pre-norm transformer block over the cells of a map.

    Attributes:
      config: Configuration of the trunk.
      stage: Stage of the block, from 0.
      side: Rows, and columns, of the map.
      groups: Order of the cells, see `cells_of`.
      window: Rows, and columns, of the windows of attention; 0 attends to the whole map.
      pool: Whether it begins a stage: it changes the width and halves the map.
      param_dtype: Dtype of the parameters.
    """

    config: HieraConfig
    stage: int
    side: int
    groups: Groups
    window: int
    pool: bool
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Cells) -> Cells:
        width, inner = self.config.widths[self.stage], self.config.mlp_width(self.stage)
        norm = functools.partial(LayerNorm, self.config.layer_norm_eps, "vision_embed", self.param_dtype)
        dense = functools.partial(Linear, param_dtype=self.param_dtype)
        normed = norm(name="ln1")(x)
        if self.pool:
            shape, axes = (x.shape[-1], width), ("vision_embed", "vision_mlp")
            x = max_pool(dense(shape, axes, name="shortcut")(normed), self.groups[-1])
        x += self._attend(normed)
        hidden = dense((width, inner), ("vision_embed", "vision_mlp"), name="fc1")(norm(name="ln2")(x))
        x += dense((inner, width), ("vision_mlp", "vision_embed"), name="fc2")(gelu(hidden))
        return constrain_row_major(x, "batch", None, None)

    def _attend(self, x: Cells) -> Cells:
        """Attends within windows, whose padding takes part; queries are pooled after their projection."""
        width, heads = self.config.widths[self.stage], self.config.heads[self.stage]
        window, is_padded = self.window or self.side, self.window not in (0, *self.groups)
        if is_padded:
            x = cells_of(map_of(x, self.side, self.groups), (window,))
        q, k, v = QueriesKeysValues((heads, width // heads), self.param_dtype, name="qkv")(x)
        if self.pool:
            q = max_pool(q, window if is_padded else self.groups[-1])
        q, k, v = (part.reshape(*part.shape[:2], heads, width // heads) for part in (q, k, v))
        out = _attention(q, k, v, window**2)
        axes = ("vision_heads", "head_dim", "vision_embed")
        out = Linear((*out.shape[2:], width), axes, num_in=2, param_dtype=self.param_dtype, name="out")(out)
        side = self.side >> self.pool
        return cells_of(map_of(out, side, (window >> self.pool,)), (side,)) if is_padded else out


class QueriesKeysValues(nn.Module):
    """Linear layer whose outputs are queries, keys and values, with the channels of all heads side by side.

    Each is a product of its own, in the layout that the kernels read: parts of one product would be copied on a TPU.

    Attributes:
      shape: Number of heads and of their channels.
      param_dtype: Dtype of the parameters.
    """

    shape: tuple[int, int]
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> list[Float[Array, "B N D"]]:
        width, axes = x.shape[-1], ("vision_embed", None, "vision_heads", "head_dim")
        init, zeros = nn.initializers.normal(width**-0.5), nn.initializers.zeros
        kernel = partitioned_param(self, "kernel", init, (width, 3, *self.shape), axes, self.param_dtype)
        bias = partitioned_param(self, "bias", zeros, (3, *self.shape), axes[1:], self.param_dtype)
        axes = axes[:1] + axes[2:]
        heads = (add_bias(linear(x, kernel[:, part], axes), bias[part], axes[1:]) for part in range(3))
        return [constrain_row_major(part.reshape(*x.shape[:2], -1), "batch", None, axes[1]) for part in heads]


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, cells: int) -> jax.Array:
    """Attends within windows.

    Args:
      q: Queries, [B, L, H, D], those of a window after those of another.
      k: Keys, [B, S, H, D].
      v: Values, likewise.
      cells: Keys of a window.

    Returns:
      The outputs, in the shape of the queries.
    """
    windows = q.shape[0] * k.shape[1] // cells
    queries = q.shape[0] * q.shape[1] // windows
    has_kernels = target_device().platform == "tpu"
    joined = joined_windows(windows, queries) if has_kernels else 1
    rows = (x.reshape(windows // joined, -1, *x.shape[2:]) for x in (q, k, v))
    if cells < _MANY and not has_kernels:
        return all_to_all_attention(*rows).reshape(q.shape)
    numbers = (jnp.tile(window_numbers(joined, count), (windows // joined, 1)) for count in (queries, cells))
    q_info, kv_info = (SegmentInfo(segments, segments) for segments in numbers)
    inputs = AttentionInputs(*rows, q_info=q_info, kv_info=kv_info, causal=False, scale=q.shape[-1] ** -0.5)
    return attention(inputs).reshape(q.shape)


def joined_windows(windows: int, queries: int) -> int:
    """Returns how many windows of some queries share a row of the kernels, which want long rows: a divisor of all."""
    return max(n for n in range(1, max(_ROW // queries, 1) + 1) if windows % n == 0)


def window_numbers(joined: int, cells: int) -> np.ndarray:
    """Returns the segment of each cell of a row of `joined` windows of some cells each, int32 from 1."""
    return np.repeat(np.arange(1, joined + 1, dtype=np.int32), cells)
