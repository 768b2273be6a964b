"""Name map of SAM-2 between the tensors of transformers, those of Meta's code, and the parameter tree: one table.

A row names a module, or a parameter that stands alone, in the tree and in both layouts. A number in braces, `{block}`,
is one of several modules; `{}` is a layer that is stacked on a new first axis of the leaf. The axes are in the notation
of `vl3_jax.checkpoint.name_specs`.

Axes: D = E width, m memory width; H heads, J head size, j that of cross-attention and F MLP width of the decoder, t
mask tokens, I = Y width of the IoU head, a = D / 8, b = D / 4; N heads, L T pairs of channels, O channels of a head and
M MLP width of the memory attention; z MLP width of the fuser; n and o channels of an embedded mask; X and W width
before and in a block of the trunk, h heads, w their size, l MLP width, e queries, keys and values; R colours. Others
are sides of kernels and 1 (U, V).
"""

import functools
import itertools
from collections.abc import Iterator

from vl3_jax.checkpoint.name_specs import LeafSpec, NameMap, TensorSpec, groups, merged_shape
from vl3_jax.sam2.sam2_config import (
    MASK_STRIDE,
    MASK_TOKENS,
    PATCH_KERNEL,
    POINT_KINDS,
    RGB,
    STAGES,
    STRIDE,
    Sam2Config,
)

SAM2_PARTS = ("image", "prompts", "masks", "memory")
SA2VA = "sam2-sa2va"  # the grounding encoder inside a released Sa2VA
# Column of the table, what comes before its names, and how its names differ from the column's.
SAM2_LAYOUTS: dict[str, tuple[int, str, dict[str, str]]] = {
    "sam2": (0, "", {}),
    "sam2-meta": (1, "", {}),
    SA2VA: (1, "grounding_encoder.sam2_model.", {".gamma": ".g_weight"}),
}

_NORM = "norm"  # a layer normalisation, whose weight is called scale
_NORM_AXES = {  # the axis that it normalises, where that is not D
    "trunk/block{block}/ln1": "X",
    "trunk/block{block}/ln2": "W",
    "prompt/mask_norm1": "o",
    "prompt/mask_norm2": "n",
    "decoder/upscale_norm": "b",
    **{f"memory_encoder/norm{number}": axis for number, axis in enumerate("ABCG", 1)},
}
_PROJECTIONS = (("q", "q_proj", "q_proj"), ("k", "k_proj", "k_proj"), ("v", "v_proj", "v_proj"))
Row = tuple[str, str, str, str, tuple[str, str] | str]  # part, leaf, transformers' name, Meta's name, axes


def _attention(leaf: str, ours: str, meta: str, heads: str, inner: str, parts: str = "masks") -> Iterator[Row]:
    """Yields the projections of an attention whose output is `heads` of `inner` channels each."""
    for name, hf_name, meta_name in _PROJECTIONS:
        axes = f"({heads} {inner}) D -> D {heads} {inner}", f"({heads} {inner}) -> {heads} {inner}"
        yield parts, f"{leaf}/{name}", f"{ours}.{hf_name}", f"{meta}.{meta_name}", axes
    axes = f"D ({heads} {inner}) -> {heads} {inner} D", "D -> D"
    yield parts, f"{leaf}/out", f"{ours}.o_proj", f"{meta}.out_proj", axes


def _mlp(part: str, leaf: str, ours: str, meta: str, widths: str) -> Iterator[Row]:
    """Yields the layers of an MLP, of which transformers names the first and the last."""
    last = len(widths) - 1
    for number, (width, out) in enumerate(itertools.pairwise(widths), 1):
        hf_name = "proj_in" if number == 1 else "proj_out" if number == last else f"layers.{number - 2}"
        axes = f"{out} {width} -> {width} {out}", f"{out} -> {out}"
        yield part, f"{leaf}/fc{number}", f"{ours}.{hf_name}", f"{meta}.layers.{number - 1}", axes


def _trunk(config: Sam2Config) -> Iterator[Row]:
    hf, meta, block = "vision_encoder.backbone", "image_encoder.trunk", "blocks.{block}"
    patch = "W R x y -> x y R W", "W -> W"
    yield "image", "trunk/patch_embed", f"{hf}.patch_embed.projection", f"{meta}.patch_embed.proj", patch
    yield "image", "trunk/position", f"{hf}.pos_embed", f"{meta}.pos_embed", "U W i d -> i d (U W)"
    yield "image", "trunk/window_position", f"{hf}.pos_embed_window", f"{meta}.pos_embed_window", "U W f K -> f K (U W)"
    qkv = "(e h w) X -> X e h w", "(e h w) -> e h w"
    for leaf, hf_name, meta_name, axes in (
        ("ln1", "layer_norm1", "norm1", _NORM),
        ("qkv", "attn.qkv", "attn.qkv", qkv),
        ("out", "attn.proj", "attn.proj", ("W (h w) -> h w W", "W -> W")),
        ("ln2", "layer_norm2", "norm2", _NORM),
        ("fc1", "mlp.proj_in", "mlp.layers.0", ("l W -> W l", "l -> l")),
        ("fc2", "mlp.proj_out", "mlp.layers.1", ("W l -> l W", "W -> W")),
        ("shortcut", "proj", "proj", ("W X -> X W", "W -> W")),
    ):
        yield "image", "trunk/block{block}/" + leaf, f"{hf}.{block}.{hf_name}", f"{meta}.{block}.{meta_name}", axes
    lateral = "vision_encoder.neck.convs.{level}", "image_encoder.neck.convs.{level}.conv"
    yield "image", "laterals_{level}", *lateral, ("D W U V -> W (U V D)", "D -> D")


def _prompts(config: Sam2Config) -> Iterator[Row]:
    hf, meta = "prompt_encoder", "sam_prompt_encoder"
    gaussian = f"{meta}.pe_layer.positional_encoding_gaussian_matrix"
    yield "prompts", "prompt/frequencies", f"{hf}.shared_embedding.positional_embedding", gaussian, "c g -> c g"
    yield "prompts", "prompt/frequencies", "shared_image_embedding.positional_embedding", "", "c g -> c g"
    yield "prompts", "prompt/point_kinds", f"{hf}.point_embed.weight", "", "k D -> k D"
    yield "prompts", "prompt/point_kinds", "", meta + ".point_embeddings.{}.weight", "U D -> (U D)"
    for leaf, name in (("not_a_point", "not_a_point_embed"), ("no_mask", "no_mask_embed")):
        yield "prompts", f"prompt/{leaf}", f"{hf}.{name}.weight", f"{meta}.{name}.weight", "U D -> (U D)"
    for leaf, hf_name, number, axes in (
        ("conv1", "conv1", 0, ("o U P Q -> P Q U o", "o -> o")),
        ("norm1", "layer_norm1", 1, _NORM),
        ("conv2", "conv2", 3, ("n o P Q -> P Q o n", "n -> n")),
        ("norm2", "layer_norm2", 4, _NORM),
        ("conv3", "conv3", 6, ("D n U V -> U V n D", "D -> D")),
    ):
        yield "prompts", f"prompt/mask_{leaf}", f"{hf}.mask_embed.{hf_name}", f"{meta}.mask_downscaling.{number}", axes


def _masks(config: Sam2Config) -> Iterator[Row]:
    hf, meta, layer = "mask_decoder", "sam_mask_decoder", "transformer.layers.{layer}"
    for leaf, name, axes in (
        ("presence_token", "obj_score_token", "U D -> U D"),
        ("iou_token", "iou_token", "U D -> U D"),
        ("mask_tokens", "mask_tokens", "t D -> t D"),
    ):
        yield "masks", f"decoder/{leaf}", f"{hf}.{name}.weight", f"{meta}.{name}.weight", axes
    for leaf, name, size in (
        ("self_attn", "self_attn", "J"),
        ("to_image", "cross_attn_token_to_image", "j"),
        ("to_tokens", "cross_attn_image_to_token", "j"),
    ):
        names = f"{hf}.{layer}.{name}", f"{meta}.{layer}.{name}"
        yield from _attention("decoder/blocks_{layer}/" + leaf, *names, "H", size)
    for number in range(1, 5):
        names = f"{hf}.{layer}.layer_norm{number}", f"{meta}.{layer}.norm{number}"
        yield "masks", "decoder/blocks_{layer}/ln" + str(number), *names, _NORM
    yield from _mlp("masks", "decoder/blocks_{layer}/mlp", f"{hf}.{layer}.mlp", f"{meta}.{layer}.mlp", "DFD")
    final = "transformer.final_attn_token_to_image"
    yield from _attention("decoder/final_attn", f"{hf}.{final}", f"{meta}.{final}", "H", "j")
    norm = f"{hf}.transformer.layer_norm_final_attn", f"{meta}.transformer.norm_final_attn"
    yield "masks", "decoder/final_norm", *norm, _NORM
    for leaf, name, number, axes in (
        ("upscale1", "upscale_conv1", 0, ("D b P Q -> D P Q b", "b -> b")),
        ("upscale_norm", "upscale_layer_norm", 1, _NORM),
        ("upscale2", "upscale_conv2", 3, ("b a P Q -> b P Q a", "a -> a")),
    ):
        yield "masks", f"decoder/{leaf}", f"{hf}.{name}", f"{meta}.output_upscaling.{number}", axes
    hyper = "output_hypernetworks_mlps.{}"
    yield from _mlp("masks", "decoder/hyper", f"{hf}.{hyper}", f"{meta}.{hyper}", "DEDa")
    iou = f"{hf}.iou_prediction_head", f"{meta}.iou_prediction_head"
    yield from _mlp("masks", "decoder/iou", *iou, "D" + ("IY" * config.iou_layers)[: config.iou_layers - 1] + "t")
    presence = f"{hf}.pred_obj_score_head", f"{meta}.pred_obj_score_head"
    yield from _mlp("masks", "decoder/presence", *presence, "DEDU")
    for leaf, name, axis in (("fine", "conv_s0", "a"), ("middle", "conv_s1", "b")):
        axes = f"{axis} D U V -> D (U V {axis})", f"{axis} -> {axis}"
        yield "masks", f"decoder/{leaf}", f"{hf}.{name}", f"{meta}.{name}", axes


def _memory(config: Sam2Config) -> Iterator[Row]:
    layer, leaf = "memory_attention.layers.{}", "memory_attention/layers"
    for name, inner, axis in (("self_attn", "self_attn", "D"), ("memory_attn", "cross_attn_image", "m")):
        for projection in "qk":  # transformers and Meta rotate neighbouring channels, the leaf has all first ones first
            source = "D" if projection == "q" else axis
            axes = f"(N L T) {source} -> {source} N (T L)", "(N L T) -> N (T L)"
            names = [f"{layer}.{inner}.{projection}_proj"] * 2
            yield "memory", f"{leaf}/{name}/{projection}", *names, axes
        axes = f"(N O) {axis} -> {axis} N O", "(N O) -> N O"
        yield "memory", f"{leaf}/{name}/v", *[f"{layer}.{inner}.v_proj"] * 2, axes
        axes = "D (N O) -> N O D", "D -> D"
        yield "memory", f"{leaf}/{name}/out", f"{layer}.{inner}.o_proj", f"{layer}.{inner}.out_proj", axes
    for number in range(1, 4):
        yield "memory", f"{leaf}/ln{number}", f"{layer}.layer_norm{number}", f"{layer}.norm{number}", _NORM
    yield "memory", f"{leaf}/mlp/fc1", *[f"{layer}.linear1"] * 2, ("M D -> D M", "M -> M")
    yield "memory", f"{leaf}/mlp/fc2", *[f"{layer}.linear2"] * 2, ("D M -> M D", "D -> D")
    yield "memory", "memory_attention/norm", "memory_attention.layer_norm", "memory_attention.norm", _NORM

    mask, meta = "memory_encoder.mask_downsampler", "memory_encoder.mask_downsampler.encoder"
    channels = "UABCG"
    for number in range(STRIDE.bit_length() - 1):
        width, out = channels[number : number + 2]
        axes = f"{out} {width} p q -> p q {width} {out}", f"{out} -> {out}"
        names = f"{mask}.layers.{number}.conv", f"{meta}.{3 * number}"
        yield "memory", f"memory_encoder/conv{number + 1}", *names, axes
        names = f"{mask}.layers.{number}.layer_norm", f"{meta}.{3 * number + 1}"
        yield "memory", f"memory_encoder/norm{number + 1}", *names, _NORM
    last = 3 * (STRIDE.bit_length() - 1)
    axes = "D G U V -> G (U V D)", "D -> D"
    yield "memory", "memory_encoder/masks", f"{mask}.final_conv", f"{meta}.{last}", axes
    names = "memory_encoder.feature_projection", "memory_encoder.pix_feat_proj"
    yield "memory", "memory_encoder/features", *names, ("E D U V -> D (U V E)", "E -> E")
    axes = "m D U V -> D (U V m)", "m -> m"
    yield "memory", "memory_encoder/out", "memory_encoder.projection", "memory_encoder.out_proj", axes
    hf, meta = "memory_encoder.memory_fuser.layers.{fuser}", "memory_encoder.fuser.layers.{fuser}"
    for leaf, hf_name, meta_name, axes in (
        ("conv", "depthwise_conv", "dwconv", ("D U r s -> r s U D", "D -> D")),
        ("norm", "layer_norm", "norm", _NORM),
        ("fc1", "pointwise_conv1", "pwconv1", ("z D -> D z", "z -> z")),
        ("fc2", "pointwise_conv2", "pwconv2", ("D z -> z D", "D -> D")),
        ("scale", "scale", "gamma", "D -> D"),
    ):
        yield "memory", "memory_encoder/fuser{fuser}/" + leaf, f"{hf}.{hf_name}", f"{meta}.{meta_name}", axes

    axes = "U V D -> (U V D)"
    yield "memory", "no_memory", "no_memory_embedding", "no_mem_embed", axes
    yield "memory", "no_memory_position", "no_memory_positional_encoding", "no_mem_pos_enc", axes
    yield "memory", "memory_time", "memory_temporal_positional_encoding", "maskmem_tpos_enc", "S U V m -> S (U V m)"
    yield "memory", "no_pointer", "no_object_pointer", "no_obj_ptr", "U D -> (U D)"
    yield from _mlp("memory", "pointer", "object_pointer_proj", "obj_ptr_proj", "DEDE")
    yield "memory", "mask_downsample", *["mask_downsample"] * 2, ("V U u v -> u v U V", "V -> V")
    if config.occlusion:
        names = "occlusion_spatial_embedding_parameter", "no_obj_embed_spatial"
        yield "memory", "occluded", *names, "U m -> (U m)"
    if config.pointer_time:
        names = "temporal_positional_encoding_projection_layer", "obj_ptr_tpos_proj"
        yield "memory", "pointer_time", *names, ("m D -> D m", "m -> m")


_SECTIONS = (_trunk, _prompts, _masks, _memory)


@functools.lru_cache(maxsize=32)
def sam2_name_map(layout: str, config: Sam2Config) -> NameMap:
    """Builds the name map of a layout of SAM-2.

    A leaf that two tensors hold a copy of is read from the first; an export writes both.

    Args:
      layout: Key of `SAM2_LAYOUTS`.
      config: Configuration, which determines the shapes.
    """
    column, prefix, renames = SAM2_LAYOUTS[layout]
    tensors: dict[str, TensorSpec] = {}
    leaves: dict[str, LeafSpec] = {}
    for part, leaf, *names, axes in (row for section in _SECTIONS for row in section(config)):
        if not names[column]:
            continue
        for place, sizes in _places(config, leaf):
            for suffix, own_axes in _parameters(axes, leaf):
                path = leaf.format(**place) + suffix[0]
                name = names[column] + suffix[1]
                for old, new in renames.items():
                    name = name.replace(old, new)
                specs = _tensors(prefix + name, path, part, own_axes, sizes, place, config)
                tensors |= {spec.name: spec for spec in specs}
                stacked = specs[0].layer is not None
                shape = (len(specs), *specs[0].slice_shape) if stacked else specs[0].slice_shape
                leaves.setdefault(path, LeafSpec(path, shape, specs))
    return NameMap(tensors, leaves)


def _places(config: Sam2Config, leaf: str) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Yields the numbers of the modules that a row stands for, and the sizes of axes in each of them."""
    hiera, sizes = config.hiera, _axis_sizes(config)
    if "{block}" in leaf:
        for number in range(sum(hiera.depths)):
            stage = max(stage for stage in range(STAGES) if hiera.first_blocks[stage] <= number)
            pools = stage > 0 and number == hiera.first_blocks[stage]
            if pools or not leaf.endswith("/shortcut"):
                width, heads = hiera.widths[stage], hiera.heads[stage]
                own = {"W": width, "X": hiera.widths[stage - pools], "h": heads, "w": width // heads}
                yield {"block": number}, sizes | own | {"l": hiera.mlp_width(stage)}
    elif "{level}" in leaf:
        yield from (({"level": level}, sizes | {"W": hiera.widths[STAGES - 1 - level]}) for level in range(STAGES))
    elif "{layer}" in leaf:
        yield from (({"layer": layer}, sizes) for layer in range(config.decoder_layers))
    elif "{fuser}" in leaf:
        yield from (({"fuser": number}, sizes) for number in range(config.fuser_layers))
    else:
        yield {}, sizes


def _parameters(axes: tuple[str, str] | str, leaf: str) -> Iterator[tuple[tuple[str, str], str]]:
    """Yields what is appended to the leaf and to the tensor's name for each parameter of a row, and its axes."""
    if axes == _NORM:
        axis = _NORM_AXES.get(leaf, "D")
        yield ("/scale", ".weight"), f"{axis} -> {axis}"
        yield ("/bias", ".bias"), f"{axis} -> {axis}"
    elif isinstance(axes, str):
        yield ("", ""), axes
    else:
        yield ("/kernel", ".weight"), axes[0]
        yield ("/bias", ".bias"), axes[1]


def _tensors(name: str, leaf: str, part: str, axes: str, sizes, place, config: Sam2Config) -> tuple[TensorSpec, ...]:
    shape, slice_shape = (merged_shape(groups(side), sizes) for side in axes.split(" -> "))
    layers: list[int | None] = [None]
    if "{}" in name:
        count = {"memory": config.memory_layers, "masks": MASK_TOKENS, "prompts": POINT_KINDS}[part]
        layers = list(range(count))
    return tuple(
        TensorSpec(name.format(layer, **place), shape, leaf, layer, slice_shape, part, axes, sizes) for layer in layers
    )


def _axis_sizes(config: Sam2Config) -> dict[str, int]:
    width, heads, mask = config.width, config.decoder_heads, config.prompt_mask_width
    head = width // config.memory_heads
    return {
        "D": width,
        "E": width,
        "m": config.memory_width,
        "H": heads,
        "J": width // heads,
        "j": width // config.decoder_downsample // heads,
        "F": config.decoder_mlp,
        "I": config.iou_width,
        "Y": config.iou_width,
        "N": config.memory_heads,
        "L": head // 2,
        "T": 2,
        "O": head,
        "M": config.memory_mlp,
        "S": config.num_memories,
        "z": config.fuser_mlp,
        "t": MASK_TOKENS,
        "k": POINT_KINDS,
        "a": width // 8,
        "b": width // 4,
        "n": mask,
        "o": mask // 4,
        "c": 2,
        "g": width // 2,
        "P": 2,
        "Q": 2,
        "p": 3,
        "q": 3,
        "r": config.fuser_kernel,
        "s": config.fuser_kernel,
        "u": MASK_STRIDE,
        "v": MASK_STRIDE,
        "x": PATCH_KERNEL,
        "y": PATCH_KERNEL,
        "i": config.hiera.position_size[0],
        "d": config.hiera.position_size[1],
        "f": config.hiera.windows[0],
        "K": config.hiera.windows[0],
        "e": 3,
        "R": RGB,
        "U": 1,
        "V": 1,
        "A": 4,
        "B": 16,
        "C": 64,
        "G": 256,
        "W": config.hiera.widths[0],
    }
