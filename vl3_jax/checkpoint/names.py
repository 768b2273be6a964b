"""Name map between Hugging Face tensors and the parameter tree: one table, used in both directions.

Each row of the table maps a tensor to a leaf and states how its axes are rearranged, in the notation of einops:
`(H K) D -> D H K` turns a tensor of shape (heads*head_dim, width) into a leaf of shape (width, heads, head_dim). `{}`
in a tensor name is the layer; leaves of such rows stack their layers on a new first axis.

Axes of the tower: W width, M MLP width, H heads, J head size, C channels, P and Q patch rows and columns. Axes of the
decoder: D width, E = D, F MLP width, N query heads, G key/value heads, K head size, V vocabulary rows.
"""

import dataclasses
import functools
import math
import re

import numpy as np

from vl3_jax.model.config import ModelConfig

# Part, leaf, tensor name after the prefix of the part, axes of the tensor -> axes of the leaf.
TABLE: tuple[tuple[str, str, str, str], ...] = (
    ("vision", "vision/patch_embed/kernel", "embeddings.patch_embedding.weight", "W C P Q -> (C P Q) W"),
    ("vision", "vision/patch_embed/bias", "embeddings.patch_embedding.bias", "W -> W"),
    ("vision", "vision/layers/ln1/scale", "encoder.layers.{}.layer_norm1.weight", "W -> W"),
    ("vision", "vision/layers/ln1/bias", "encoder.layers.{}.layer_norm1.bias", "W -> W"),
    ("vision", "vision/layers/attn/q/kernel", "encoder.layers.{}.self_attn.q_proj.weight", "(H J) W -> W H J"),
    ("vision", "vision/layers/attn/q/bias", "encoder.layers.{}.self_attn.q_proj.bias", "(H J) -> H J"),
    ("vision", "vision/layers/attn/k/kernel", "encoder.layers.{}.self_attn.k_proj.weight", "(H J) W -> W H J"),
    ("vision", "vision/layers/attn/k/bias", "encoder.layers.{}.self_attn.k_proj.bias", "(H J) -> H J"),
    ("vision", "vision/layers/attn/v/kernel", "encoder.layers.{}.self_attn.v_proj.weight", "(H J) W -> W H J"),
    ("vision", "vision/layers/attn/v/bias", "encoder.layers.{}.self_attn.v_proj.bias", "(H J) -> H J"),
    ("vision", "vision/layers/attn/out/kernel", "encoder.layers.{}.self_attn.out_proj.weight", "W (H J) -> H J W"),
    ("vision", "vision/layers/attn/out/bias", "encoder.layers.{}.self_attn.out_proj.bias", "W -> W"),
    ("vision", "vision/layers/ln2/scale", "encoder.layers.{}.layer_norm2.weight", "W -> W"),
    ("vision", "vision/layers/ln2/bias", "encoder.layers.{}.layer_norm2.bias", "W -> W"),
    ("vision", "vision/layers/mlp/fc1/kernel", "encoder.layers.{}.mlp.fc1.weight", "M W -> W M"),
    ("vision", "vision/layers/mlp/fc1/bias", "encoder.layers.{}.mlp.fc1.bias", "M -> M"),
    ("vision", "vision/layers/mlp/fc2/kernel", "encoder.layers.{}.mlp.fc2.weight", "W M -> M W"),
    ("vision", "vision/layers/mlp/fc2/bias", "encoder.layers.{}.mlp.fc2.bias", "W -> W"),
    ("vision", "vision/post_ln/scale", "post_layernorm.weight", "W -> W"),
    ("vision", "vision/post_ln/bias", "post_layernorm.bias", "W -> W"),
    ("projector", "projector/fc1/kernel", "0.weight", "D W -> W D"),
    ("projector", "projector/fc1/bias", "0.bias", "D -> D"),
    ("projector", "projector/fc2/kernel", "2.weight", "E D -> D E"),
    ("projector", "projector/fc2/bias", "2.bias", "E -> E"),
    ("llm", "llm/embed/embedding", "embed_tokens.weight", "V D -> V D"),
    ("llm", "llm/layers/ln_attn/scale", "layers.{}.input_layernorm.weight", "D -> D"),
    ("llm", "llm/layers/attn/q/kernel", "layers.{}.self_attn.q_proj.weight", "(N K) D -> D N K"),
    ("llm", "llm/layers/attn/q/bias", "layers.{}.self_attn.q_proj.bias", "(N K) -> N K"),
    ("llm", "llm/layers/attn/k/kernel", "layers.{}.self_attn.k_proj.weight", "(G K) D -> D G K"),
    ("llm", "llm/layers/attn/k/bias", "layers.{}.self_attn.k_proj.bias", "(G K) -> G K"),
    ("llm", "llm/layers/attn/v/kernel", "layers.{}.self_attn.v_proj.weight", "(G K) D -> D G K"),
    ("llm", "llm/layers/attn/v/bias", "layers.{}.self_attn.v_proj.bias", "(G K) -> G K"),
    ("llm", "llm/layers/attn/out/kernel", "layers.{}.self_attn.o_proj.weight", "D (N K) -> N K D"),
    ("llm", "llm/layers/ln_mlp/scale", "layers.{}.post_attention_layernorm.weight", "D -> D"),
    ("llm", "llm/layers/mlp/gate/kernel", "layers.{}.mlp.gate_proj.weight", "F D -> D F"),
    ("llm", "llm/layers/mlp/up/kernel", "layers.{}.mlp.up_proj.weight", "F D -> D F"),
    ("llm", "llm/layers/mlp/down/kernel", "layers.{}.mlp.down_proj.weight", "D F -> F D"),
    ("llm", "llm/norm/scale", "norm.weight", "D -> D"),
    ("head", "llm/lm_head/kernel", "lm_head.weight", "V D -> D V"),
)

PARTS = ("vision", "projector", "llm", "head")

_OFFICIAL = {
    "vision": "model.vision_encoder.",
    "projector": "model.mm_projector.readout.",
    "llm": "model.",
    "head": "",
}
# Prefix of each part's tensor names in each layout; a layout does not store the parts that are absent.
LAYOUTS: dict[str, dict[str, str]] = {
    "official": _OFFICIAL,
    "official-train": _OFFICIAL | {"vision": "model.vision_encoder.vision_encoder."},
    "native": {
        "vision": "model.vision_model.",
        "projector": "model.projector.readout.",
        "llm": "model.language_model.",
        "head": "",
    },
    "qwen2": {"llm": "model.", "head": ""},
    "siglip": {"vision": "vision_model."},
    "siglip-bare": {"vision": ""},
    "navit": {"vision": ""},
}

_SIGLIP_EXTRAS = (
    r"(vision_model\.)?embeddings\.position_embedding\.weight",
    r"(vision_model\.)?embeddings\.position_ids",
    r"(vision_model\.)?head\..+",
    r"text_model\..+",
    r"logit_scale",
    r"logit_bias",
)
# Tensors that a layout may contain and the model does not use.
DROPPABLE: dict[str, tuple[str, ...]] = {"siglip": _SIGLIP_EXTRAS, "siglip-bare": _SIGLIP_EXTRAS}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One Hugging Face tensor and the slice of a leaf that it corresponds to.

    Attributes:
      name: Name of the tensor.
      shape: Shape of the tensor.
      leaf: Path of the leaf.
      layer: Layer of the leaf, or None if the leaf is not stacked.
      slice_shape: Shape of the leaf without its layer axis.
      part: Part of the model, one of `PARTS`.
      axes: Axes of the tensor and of the slice, such as "(H K) D -> D H K".
      sizes: Size of each axis.
    """

    name: str
    shape: tuple[int, ...]
    leaf: str
    layer: int | None
    slice_shape: tuple[int, ...]
    part: str
    axes: str
    sizes: dict[str, int]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def to_leaf(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a view of the tensor, or of some of its rows, with the axes of its leaf; never copies."""
        return self._rearrange(tensor, *self._sides())

    def to_tensor(self, leaf_slice: np.ndarray) -> np.ndarray:
        """Inverts `to_leaf`, also as a view."""
        return self._rearrange(leaf_slice, *reversed(self._sides()))

    def row_axis(self) -> int | None:
        """Returns the axis of the slice that is the tensor's first axis, or None if that axis is split or merged."""
        left, right = self._sides()
        return right.index(left[0]) if len(left[0]) == 1 and left[0] in right else None

    def outer_axis(self) -> int:
        """Returns the axis of the slice whose parts lie one after another in the tensor."""
        left, right = self._sides()
        return next(axis for axis, group in enumerate(right) if group.startswith(left[0][0]))

    def _sides(self) -> list[tuple[str, ...]]:
        return [_groups(side) for side in self.axes.split(" -> ")]

    def _rearrange(self, array: np.ndarray, source: tuple[str, ...], target: tuple[str, ...]) -> np.ndarray:
        sizes = self.sizes | dict(zip(source, array.shape, strict=True))
        split, moved = "".join(source), "".join(target)
        array = array.reshape([sizes[axis] for axis in split])
        return array.transpose([split.index(axis) for axis in moved]).reshape(_shape(target, sizes))


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """One leaf of the parameter tree.

    Attributes:
      path: Path of the leaf, such as "llm/norm/scale".
      shape: Full shape, with the layer axis if the leaf is stacked.
      tensors: Tensors that fill the leaf, in layer order.
    """

    path: str
    shape: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]

    @property
    def stacked(self) -> bool:
        return self.tensors[0].layer is not None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def part(self) -> str:
        return self.tensors[0].part

    def tensor(self, layer: int | None) -> TensorSpec:
        """Returns the tensor that fills a layer, or the whole leaf if `layer` is None."""
        return self.tensors[layer or 0]


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Tensors and leaves of one layout for one model configuration.

    Attributes:
      tensors: Specs of the tensors by name.
      leaves: Specs of the leaves by path.
    """

    tensors: dict[str, TensorSpec]
    leaves: dict[str, LeafSpec]


@functools.lru_cache(maxsize=32)
def name_map(layout: str, config: ModelConfig, parts: tuple[str, ...] = PARTS) -> NameMap:
    """Builds the name map of a layout.

    With tied embeddings the map has no head, so none is expected and none is written.

    Args:
      layout: Key of `LAYOUTS`.
      config: Model configuration, which determines the shapes.
      parts: Parts of the model to include.
    """
    prefixes, sizes, leaves = LAYOUTS[layout], _axis_sizes(config), {}
    for part, leaf, suffix, axes in TABLE:
        if part not in prefixes or part not in parts or (part == "head" and config.text.tie_word_embeddings):
            continue
        shape, slice_shape = (_shape(_groups(side), sizes) for side in axes.split(" -> "))
        num_layers = config.vision.num_layers if part == "vision" else config.text.num_layers
        stacked = "{}" in suffix
        specs = tuple(
            TensorSpec(prefixes[part] + suffix.format(layer), shape, leaf, layer, slice_shape, part, axes, sizes)
            for layer in (range(num_layers) if stacked else [None])
        )
        leaves[leaf] = LeafSpec(leaf, (num_layers, *slice_shape) if stacked else slice_shape, specs)
    tensors = {spec.name: spec for leaf in leaves.values() for spec in leaf.tensors}
    return NameMap(tensors, leaves)


def is_droppable(name: str, layout: str, config: ModelConfig) -> bool:
    """Returns whether a checkpoint of `layout` may contain the tensor `name` although the model does not use it."""
    is_tied_head = name == "lm_head.weight" and config.text.tie_word_embeddings and "head" in LAYOUTS[layout]
    return is_tied_head or any(re.fullmatch(pattern, name) for pattern in DROPPABLE.get(layout, ()))


def _axis_sizes(config: ModelConfig) -> dict[str, int]:
    vision, text = config.vision, config.text
    return {
        "W": vision.hidden_size,
        "M": vision.intermediate_size,
        "H": vision.num_heads,
        "J": vision.head_dim,
        "C": vision.num_channels,
        "P": vision.patch_size,
        "Q": vision.patch_size,
        "D": text.hidden_size,
        "E": text.hidden_size,
        "F": text.intermediate_size,
        "N": text.num_heads,
        "G": text.num_kv_heads,
        "K": text.head_dim,
        "V": text.vocab_size,
    }


@functools.lru_cache(maxsize=128)
def _groups(side: str) -> tuple[str, ...]:
    """Splits `"D (H K)"` into `("D", "HK")`."""
    return tuple(group.strip("()").replace(" ", "") for group in re.findall(r"\([^)]*\)|\w", side))


def _shape(groups: tuple[str, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis] for axis in group) for group in groups)
