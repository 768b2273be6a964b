"""Name map of a Sa2VA: the tensors of VideoLLaMA3 in one of its layouts, those of SAM-2, and what joins them.

`text_hidden_fcs` are the two linear layers between a hidden state and a prompt of the mask decoder. `grounding_encoder`
is SAM-2 under the names of transformers, and `stock_mask_decoder` its mask decoder as it was before training, with
which Sa2VA-i tracks.
"""

import dataclasses
import functools

from vl3_jax.checkpoint.name_specs import LeafSpec, NameMap, TensorSpec
from vl3_jax.checkpoint.sam2_names import sam2_name_map
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig

JOINT, STOCK = "joint", "stock"
SA2VA_PARTS = (JOINT, STOCK)
# Layout of a Sa2VA, and that of its VideoLLaMA3.
GROUNDED_LAYOUTS = {"sa2va-official": "official", "sa2va-native": "native"}
SAM2_LEAVES, STOCK_LEAVES, JOINT_LEAVES = "sam2/", "stock_decoder/", "text_hidden_fcs/"
_DECODER_LEAVES, _DECODER_NAMES = "decoder/", "mask_decoder."
# Leaf, tensor, axes: D the width of the language model, E = D, W that of SAM-2.
_JOINT_TABLE = (
    ("fc1/kernel", "0.weight", "E D -> D E"),
    ("fc1/bias", "0.bias", "E -> E"),
    ("fc2/kernel", "2.weight", "W D -> D W"),
    ("fc2/bias", "2.bias", "W -> W"),
)


@functools.lru_cache(maxsize=8)
def sa2va_leaves(config: Sa2vaConfig) -> dict[str, LeafSpec]:
    """Returns the leaves that a Sa2VA has beside those of its language model."""
    sam2 = sam2_name_map("sam2", config.sam2).leaves
    leaves = {f"{SAM2_LEAVES}{path}": _moved(spec, SAM2_LEAVES, "grounding_encoder.") for path, spec in sam2.items()}
    for path, spec in sam2.items():
        if path.startswith(_DECODER_LEAVES):
            moved = _moved(spec, "stock_", "stock_")
            tensors = tuple(dataclasses.replace(tensor, part=STOCK) for tensor in moved.tensors)
            leaves[moved.path] = dataclasses.replace(moved, tensors=tensors)
    width = config.chat.text.hidden_size
    sizes = {"D": width, "E": width, "W": config.sam2.width}
    for leaf, name, axes in _JOINT_TABLE:
        left, right = (tuple(sizes[axis] for axis in side.split()) for side in axes.split(" -> "))
        path = f"{JOINT_LEAVES}{leaf}"
        spec = TensorSpec(f"text_hidden_fcs.{name}", left, path, None, right, JOINT, axes, sizes)
        leaves[path] = LeafSpec(path, right, (spec,))
    return leaves


def with_sa2va(chat: NameMap, config: Sa2vaConfig) -> NameMap:
    """Returns the name map of a Sa2VA, from that of its language model."""
    leaves = chat.leaves | sa2va_leaves(config)
    return NameMap({spec.name: spec for leaf in leaves.values() for spec in leaf.tensors}, leaves)


def _moved(spec: LeafSpec, path: str, name: str) -> LeafSpec:
    """Returns a leaf with prefixes in front of its path and of the names of its tensors."""
    tensors = (dataclasses.replace(each, name=name + each.name, leaf=path + each.leaf) for each in spec.tensors)
    return LeafSpec(path + spec.path, spec.shape, tuple(tensors))
