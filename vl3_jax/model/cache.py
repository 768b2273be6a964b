"""The key/value cache of the decoder: static arrays that carry the segment and position of every slot."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int32

from vl3_jax.kernels.keys_values import KeysValues, row_numbers
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model.config import TextConfig
from vl3_jax.parallel.rules import current_mesh, partition_spec


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of S slots for each of R rows.

    The slot of a token (counted by `length`) is independent of its position in the text (`positions`). Padding is
    never written, so rows of different lengths grow side by side without holes, and a slot can be freed by setting
    its segment to 0.

    Attributes:
      keys_values: Keys and values of all layers, arrays of [layers, R, K, S, D]; for serving a tuple with those of each
        layer, [1, R, K, S, D].
      segment_ids: Segment of each slot, [R, S] int32; nothing attends to a slot of segment 0.
      positions: Position of the token in each slot, [R, S] int32.
      length: Number of slots written, [R] int32. Tokens that do not fit after a row's last slot are dropped.
    """

    keys_values: KeysValues | tuple[KeysValues, ...]
    segment_ids: Int32[Array, "R S"]
    positions: Int32[Array, "R S"]
    length: Int32[Array, " R"]

    @classmethod
    def empty(
        cls,
        config: TextConfig,
        rows: int,
        slots: int,
        dtype: DTypeLike = jnp.float32,
        serving: bool = False,
    ) -> "KVCache":
        """Creates an empty cache.

        Args:
          config: Sizes of the decoder.
          rows: Number of rows.
          slots: Tokens of a row.
          dtype: Type of keys and values. int8 takes about half of the memory of bfloat16, with a scale for each token
            and head.
          serving: As of the model: each layer then has arrays of its own.
        """

        def zeros(layers: int) -> KeysValues:
            shape = (layers, rows, config.num_kv_heads, slots)
            arrays = [jnp.zeros((*shape, config.head_dim), dtype) for _ in range(2)]
            scales = [jnp.zeros(shape) for _ in range(2)] if dtype == jnp.int8 else ()
            return KeysValues(*arrays, *scales)

        layers = config.num_layers
        return cls(
            keys_values=tuple(zeros(1) for _ in range(layers)) if serving else zeros(layers),
            segment_ids=jnp.zeros((rows, slots), jnp.int32),
            positions=jnp.zeros((rows, slots), jnp.int32),
            length=jnp.zeros(rows, jnp.int32),
        )

    def axes(self) -> Any:
        """Returns a tree like the cache with the logical axes of each array (see `vl3_jax.parallel.rules`)."""
        names = {5: (None, "batch", "kv_heads", None, None), 4: (None, "batch", "kv_heads", None)}
        names |= {2: ("batch", None), 1: ("batch",)}
        return jax.tree.map(lambda leaf: names[leaf.ndim], self)

    def info(self, rows: Int32[Array, " B"] | None = None) -> SegmentInfo:
        """Returns segments and positions of the slots of some rows, [B, S] each; None for all rows."""
        info = SegmentInfo(self.segment_ids, self.positions)
        return info if rows is None else jax.tree.map(lambda x: x[rows], info)

    def reserve_slots(
        self, info: SegmentInfo, rows: Int32[Array, " B"] | None = None
    ) -> tuple["KVCache", Int32[Array, "B L"]]:
        """Reserves slots for the new tokens whose segment is not 0.

        Args:
          info: Segments and positions of the new tokens, [B, L].
          rows: Row of the cache of each row of tokens, [B] int32, all different; None where they are the same.

        Returns:
          The cache with the segments and positions of the new tokens, and the slot of each token for `write`,
          [B, L] int32; S for a token that is not written.
        """
        valid, row = info.segment_ids > 0, row_numbers(rows, info.segment_ids)
        slots = self.length[row][:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        slots = jnp.where(valid, slots, self.segment_ids.shape[1])
        cache = self.replace(
            segment_ids=self.segment_ids.at[row[:, None], slots].set(info.segment_ids, mode="drop"),
            positions=self.positions.at[row[:, None], slots].set(info.positions, mode="drop"),
            length=self.length.at[row].add(valid.sum(1, dtype=jnp.int32)),
        )
        return cache, slots

    def write(
        self,
        rows: Int32[Array, " B"] | None,
        slots: Int32[Array, "B L"],
        new: jax.Array | list[jax.Array],
    ) -> "KVCache":
        """Writes the keys and values of the new tokens.

        Args:
          rows: As `reserve_slots`.
          slots: Slots from `reserve_slots`.
          new: Key and value of each head, [layers, B, L, K * 2 * D]; for serving a list of [1, ...].
        """
        if isinstance(self.keys_values, tuple):
            written = tuple(_write(*each, rows, slots) for each in zip(self.keys_values, new, strict=True))
        else:
            written = _write(self.keys_values, new, rows, slots)
        return self.replace(keys_values=written)

    def truncate(self, row: Int32[Array, "..."], length: Int32[Array, "..."]) -> "KVCache":
        """Keeps the first `length` slots at most of a row, or of several ([n] of both); 0 empties it."""
        kept = jnp.arange(self.segment_ids.shape[1]) < length[..., None]
        return self.replace(
            segment_ids=self.segment_ids.at[row].multiply(kept.astype(jnp.int32)),
            length=self.length.at[row].min(length),
        )


def _write(cached: KeysValues, new: Any, rows: Int32[Array, " B"] | None, slots: Int32[Array, "B L"]) -> KeysValues:
    """Writes new keys and values; on a mesh each device those of its own rows and heads."""
    mesh = current_mesh()
    if mesh is None:
        return cached.write(rows, slots, new)
    batch, heads = partition_spec(("batch", "kv_heads"), cached.keys.shape[1:3], mesh)
    cache_spec = PartitionSpec(None, batch, heads)
    new_batch = batch if rows is None else None

    def local(cached: KeysValues, new: Any, rows: jax.Array | None, slots: jax.Array) -> KeysValues:
        first_row = 0 if rows is None or batch is None else jax.lax.axis_index(batch) * cached.keys.shape[1]
        return cached.write(rows, slots, new, first_row)

    in_specs = (cache_spec, PartitionSpec(None, new_batch, None, heads), PartitionSpec(), PartitionSpec(new_batch))
    return jax.shard_map(local, in_specs=in_specs, out_specs=cache_spec, check_vma=False)(cached, new, rows, slots)
