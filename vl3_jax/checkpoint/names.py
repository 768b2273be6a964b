"""Name map between Hugging Face tensors and the parameter tree: one table, used in both directions.

Each row of the table maps a tensor to a leaf and states how its axes are rearranged, in the notation of einops:
`(H K) D -> D H K` turns a tensor of shape (heads*head_dim, width) into a leaf of shape (width, heads, head_dim). `{}`
in a tensor name is the layer; leaves of such rows stack their layers on a new first axis.

Axes of the tower: D width, F MLP width, H heads, K head size, C channels, P and Q patch rows and columns.
Axes of the projector: W tower width, D decoder width, E = D. Axes of the decoder: D width, F MLP width, N query heads,
G key/value heads, K head size, V vocabulary rows.
"""

import dataclasses
import functools
import math
import re

import numpy as np

from vl3_jax.model.config import ModelConfig

# Part, leaf, tensor name after the prefix of the part, axes of the tensor -> axes of the leaf.
TABLE: tuple[tuple[str, str, str, str], ...] = (
    ("vision", "vision/patch_embed/kernel", "embeddings.patch_embedding.weight", "D C P Q -> (C P Q) D"),
    ("vision", "vision/patch_embed/bias", "embeddings.patch_embedding.bias", "D -> D"),
    ("vision", "vision/layers/ln1/scale", "encoder.layers.{}.layer_norm1.weight", "D -> D"),
    ("vision", "vision/layers/ln1/bias", "encoder.layers.{}.layer_norm1.bias", "D -> D"),
    ("vision", "vision/layers/attn/q/kernel", "encoder.layers.{}.self_attn.q_proj.weight", "(H K) D -> D H K"),
    ("vision", "vision/layers/attn/q/bias", "encoder.layers.{}.self_attn.q_proj.bias", "(H K) -> H K"),
    ("vision", "vision/layers/attn/k/kernel", "encoder.layers.{}.self_attn.k_proj.weight", "(H K) D -> D H K"),
    ("vision", "vision/layers/attn/k/bias", "encoder.layers.{}.self_attn.k_proj.bias", "(H K) -> H K"),
    ("vision", "vision/layers/attn/v/kernel", "encoder.layers.{}.self_attn.v_proj.weight", "(H K) D -> D H K"),
    ("vision", "vision/layers/attn/v/bias", "encoder.layers.{}.self_attn.v_proj.bias", "(H K) -> H K"),
    ("vision", "vision/layers/attn/out/kernel", "encoder.layers.{}.self_attn.out_proj.weight", "D (H K) -> H K D"),
    ("vision", "vision/layers/attn/out/bias", "encoder.layers.{}.self_attn.out_proj.bias", "D -> D"),
    ("vision", "vision/layers/ln2/scale", "encoder.layers.{}.layer_norm2.weight", "D -> D"),
    ("vision", "vision/layers/ln2/bias", "encoder.layers.{}.layer_norm2.bias", "D -> D"),
    ("vision", "vision/layers/mlp/fc1/kernel", "encoder.layers.{}.mlp.fc1.weight", "F D -> D F"),
    ("vision", "vision/layers/mlp/fc1/bias", "encoder.layers.{}.mlp.fc1.bias", "F -> F"),
    ("vision", "vision/layers/mlp/fc2/kernel", "encoder.layers.{}.mlp.fc2.weight", "D F -> F D"),
    ("vision", "vision/layers/mlp/fc2/bias", "encoder.layers.{}.mlp.fc2.bias", "D -> D"),
    ("vision", "vision/post_ln/scale", "post_layernorm.weight", "D -> D"),
    ("vision", "vision/post_ln/bias", "post_layernorm.bias", "D -> D"),
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

# Prefix of each part's tensor names in each layout; a layout does not store the parts that are absent.
LAYOUTS: dict[str, dict[str, str]] = {
    "official": {
        "vision": "model.vision_encoder.",
        "projector": "model.mm_projector.readout.",
        "llm": "model.",
        "head": "",
    },
    "official-train": {
        "vision": "model.vision_encoder.vision_encoder.",
        "projector": "model.mm_projector.readout.",
        "llm": "model.",
        "head": "",
    },
    "native": {
        "vision": "model.vision_model.",
        "projector": "model.projector.readout.",
        "llm": "model.language_model.",
        "head": "",
    },
    "qwen2": {"llm": "model.", "head": ""},
    "siglip": {"vision": "vision_model."},
    "navit": {"vision": ""},
}

# Tensors that a layout may contain and the model does not use.
_SIGLIP_EXTRAS = (
    r"(vision_model\.)?embeddings\.position_embedding\.weight",
    r"(vision_model\.)?embeddings\.position_ids",
    r"(vision_model\.)?head\..+",
    r"text_model\..+",
    r"logit_scale",
    r"logit_bias",
)
DROPPABLE: dict[str, tuple[str, ...]] = {"siglip": _SIGLIP_EXTRAS, "siglip-bare": _SIGLIP_EXTRAS}
LAYOUTS["siglip-bare"] = {"vision": ""}


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
      sizes: Pairs of axis and size.
    """

    name: str
    shape: tuple[int, ...]
    leaf: str
    layer: int | None
    slice_shape: tuple[int, ...]
    part: str
    axes: str
    sizes: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def to_leaf(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a view of the tensor with the axes of its leaf; never copies."""
        left, right = self.axes.split(" -> ")
        return _rearrange(tensor, left, right, dict(self.sizes))

    def to_tensor(self, leaf_slice: np.ndarray) -> np.ndarray:
        """Inverts `to_leaf`, also as a view."""
        left, right = self.axes.split(" -> ")
        return _rearrange(leaf_slice, right, left, dict(self.sizes))

    def row_axis(self) -> int | None:
        """Returns the axis of the slice that is the tensor's first axis, or None if that axis is split or merged."""
        left, right = (_groups(side) for side in self.axes.split(" -> "))
        return right.index(left[0]) if len(left[0]) == 1 and left[0] in right else None

    def rows(self, start: int, stop: int) -> "TensorSpec":
        """Returns the spec of the tensor's rows `start:stop`; the tensor must have a `row_axis`."""
        left, right = self.axes.split(" -> ")
        sizes = dict(self.sizes) | {_groups(left)[0]: stop - start}
        shapes = {"shape": _shape(left, sizes), "slice_shape": _shape(right, sizes)}
        return dataclasses.replace(self, sizes=tuple(sizes.items()), **shapes)


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


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Tensors and leaves of one layout for one model configuration.

    Attributes:
      layout: Key of `LAYOUTS`.
      tensors: Specs of the tensors by name.
      leaves: Specs of the leaves by path.
    """

    layout: str
    tensors: dict[str, TensorSpec]
    leaves: dict[str, LeafSpec]

    def by_leaf(self) -> dict[tuple[str, int | None], TensorSpec]:
        """Returns the tensor specs by (leaf, layer)."""
        return {(spec.leaf, spec.layer): spec for spec in self.tensors.values()}


@functools.lru_cache(maxsize=32)
def name_map(layout: str, config: ModelConfig, parts: tuple[str, ...] = PARTS) -> NameMap:
    """Builds the name map of a layout.

    With tied embeddings the map has no head, so none is expected and none is written.

    Args:
      layout: Key of `LAYOUTS`.
      config: Model configuration, which determines the shapes.
      parts: Parts of the model to include.
    """
    prefixes = LAYOUTS[layout]
    tensors, leaves = {}, {}
    for part, leaf, suffix, axes in TABLE:
        if part not in prefixes or part not in parts or (part == "head" and config.text.tie_word_embeddings):
            continue
        sizes = _axis_sizes(part, config)
        left, right = axes.split(" -> ")
        num_layers = config.vision.num_layers if part == "vision" else config.text.num_layers
        layers = range(num_layers) if "{}" in suffix else [None]
        specs = tuple(
            TensorSpec(
                name=prefixes[part] + suffix.format(layer),
                shape=_shape(left, sizes),
                leaf=leaf,
                layer=layer,
                slice_shape=_shape(right, sizes),
                part=part,
                axes=axes,
                sizes=tuple(sizes.items()),
            )
            for layer in layers
        )
        stack = () if layers == [None] else (num_layers,)
        leaves[leaf] = LeafSpec(leaf, stack + _shape(right, sizes), specs)
        tensors.update((spec.name, spec) for spec in specs)
    return NameMap(layout, tensors, leaves)


def is_droppable(name: str, layout: str, config: ModelConfig) -> bool:
    """Returns whether a checkpoint of `layout` may contain the tensor `name` although the model does not use it."""
    if name == "lm_head.weight" and config.text.tie_word_embeddings and "head" in LAYOUTS[layout]:
        return True
    return any(re.fullmatch(pattern, name) for pattern in DROPPABLE.get(layout, ()))


def _axis_sizes(part: str, config: ModelConfig) -> dict[str, int]:
    vision, text = config.vision, config.text
    if part == "vision":
        return {
            "D": vision.hidden_size,
            "F": vision.intermediate_size,
            "H": vision.num_heads,
            "K": vision.head_dim,
            "C": vision.num_channels,
            "P": vision.patch_size,
            "Q": vision.patch_size,
        }
    if part == "projector":
        return {"W": vision.hidden_size, "D": text.hidden_size, "E": text.hidden_size}
    return {
        "D": text.hidden_size,
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


def _shape(side: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis] for axis in group) for group in _groups(side))


def _rearrange(array: np.ndarray, left: str, right: str, sizes: dict[str, int]) -> np.ndarray:
    """Returns a view of `array`, whose axes are `left`, with the axes `right`."""
    source, target = "".join(_groups(left)), "".join(_groups(right))
    array = array.reshape([sizes[axis] for axis in source])
    return array.transpose([source.index(axis) for axis in target]).reshape(_shape(right, sizes))
