"""Name map between Hugging Face tensors and the parameter tree: one table, used in both directions.

Each row of the table maps a tensor to a leaf and states how its axes are rearranged, in the notation of einops:
`(H K) D -> D H K` turns a tensor of shape (heads*head_dim, width) into a leaf of shape (width, heads, head_dim). `{}`
in a tensor name is the layer; leaves of such rows stack their layers on a new first axis.

Axes of the tower: W width, M MLP width, H heads, J head size, C channels, P and Q patch rows and columns. Axes of the
decoder: D width, E = D, F MLP width, N query heads, G key/value heads, K head size, V vocabulary rows.
"""

import functools
import re

from vl3_jax.checkpoint.name_specs import LeafSpec, NameMap, TensorSpec, groups, merged_shape
from vl3_jax.checkpoint.sa2va_names import GROUNDED_LAYOUTS, SA2VA_PARTS, with_sa2va
from vl3_jax.checkpoint.sam2_names import SAM2_PARTS, sam2_name_map
from vl3_jax.model.config import ModelConfig
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig
from vl3_jax.sam2.sam2_config import Sam2Config

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
ALL_PARTS = (*PARTS, *SAM2_PARTS, *SA2VA_PARTS)
AnyConfig = ModelConfig | Sam2Config | Sa2vaConfig

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


@functools.lru_cache(maxsize=32)
def name_map(layout: str, config: AnyConfig, parts: tuple[str, ...] = ALL_PARTS) -> NameMap:
    """Builds the name map of a layout.

    With tied embeddings the map has no head, so none is expected and none is written.

    Args:
      layout: Key of `LAYOUTS`, or of those of SAM-2 or Sa2VA.
      config: Model configuration, which determines the shapes.
      parts: Parts of the model to include.
    """
    if isinstance(config, Sam2Config):
        return sam2_name_map(layout, config)
    if isinstance(config, Sa2vaConfig):
        return with_sa2va(name_map(GROUNDED_LAYOUTS[layout], config.chat), config)
    prefixes, sizes, leaves = LAYOUTS[layout], _axis_sizes(config), {}
    for part, leaf, suffix, axes in TABLE:
        if part not in prefixes or part not in parts or (part == "head" and config.text.tie_word_embeddings):
            continue
        shape, slice_shape = (merged_shape(groups(side), sizes) for side in axes.split(" -> "))
        num_layers = config.vision.num_layers if part == "vision" else config.text.num_layers
        stacked = "{}" in suffix
        specs = tuple(
            TensorSpec(prefixes[part] + suffix.format(layer), shape, leaf, layer, slice_shape, part, axes, sizes)
            for layer in (range(num_layers) if stacked else [None])
        )
        leaves[leaf] = LeafSpec(leaf, (num_layers, *slice_shape) if stacked else slice_shape, specs)
    tensors = {spec.name: spec for leaf in leaves.values() for spec in leaf.tensors}
    return NameMap(tensors, leaves)


def canonical_layout(config: AnyConfig) -> str:
    """Returns the layout after which the leaves of an Orbax folder are listed."""
    if isinstance(config, Sa2vaConfig):
        return "sa2va-official"
    return "sam2" if isinstance(config, Sam2Config) else "official"


def is_droppable(name: str, layout: str, config: AnyConfig) -> bool:
    """Returns whether a checkpoint of `layout` may contain the tensor `name` although the model does not use it."""
    if isinstance(config, Sam2Config):
        return False
    if isinstance(config, Sa2vaConfig):
        return is_droppable(name, GROUNDED_LAYOUTS[layout], config.chat)
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
