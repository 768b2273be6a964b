"""Lists the content of a checkpoint, and compares two: names, shapes, configuration, values and logits."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.checkpoint.loading import load
from vl3_jax.checkpoint.name_specs import LeafSpec
from vl3_jax.checkpoint.sam2_hf_config import config_differences
from vl3_jax.checkpoint.sources import CheckpointSource, chat_config
from vl3_jax.checkpoint.tensors import bits
from vl3_jax.model import ModelConfig, VideoLLaMA3, decode, encode, unembed
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig
from vl3_jax.sam2.sam2_config import Sam2Config
from vl3_jax.storage.progress import human_bytes, progress_bar
from vl3_jax.text_table import text_table

_ALIGN = "<<<>>"
_MODULES = {
    "vision": "vision",
    "projector": "projector",
    "llm": "llm",
    "head": "llm (lm_head)",
    "joint": "text_hidden_fcs",
    "stock": "stock mask decoder",
}  # others have the name of their part

# Configuration fields that neither the parameters nor the forward pass depend on.
_IGNORED_FIELDS = {"max_position_embeddings"}
_PIECE_ITEMS = 2**25
_LOGITS_FACTOR = 10.0  # logits accumulate differences: they may differ by this many tolerances, in units of their RMS


def checkpoint_overview(source: CheckpointSource) -> str:
    """Returns a table of all leaves with shape, dtype, parameters and bytes, and one of the totals."""

    def row(name: str, leaves: Collection[LeafSpec], shape: str = "", dtype: str = "") -> tuple[str, ...]:
        nbytes = sum(spec.size * source.dtypes[spec.path].itemsize for spec in leaves)
        return name, shape, dtype, f"{sum(spec.size for spec in leaves):,}", human_bytes(nbytes)

    leaves, dtypes = source.leaves.values(), {path: dtype.name for path, dtype in source.dtypes.items()}
    rows = [("leaf", "shape", "dtype", "parameters", "size")]
    rows += [row(spec.path, [spec], "x".join(map(str, spec.shape)), dtypes[spec.path]) for spec in leaves]
    modules = {part: [spec for spec in leaves if spec.part == part] for part in source.parts}
    summary = [("module", "", "", "parameters", "size")]
    summary += [row(_MODULES.get(part, part), members) for part, members in modules.items() if members]
    summary.append(row("total", leaves, dtype=", ".join(sorted(set(dtypes.values())))))
    title = f"{source.location}: {source.kind} checkpoint"
    if "llm" in source.parts:
        title += f", embeddings {'tied' if chat_config(source).text.tie_word_embeddings else 'untied'}"
    return "\n".join([title, "", *text_table(rows, _ALIGN), "", *text_table(summary, _ALIGN)])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Attributes:
      equal: Whether nothing differs by more than the tolerance.
      lines: Report, with the differences first and the largest value differences first among them.
    """

    equal: bool
    lines: list[str]


def compare(
    a: CheckpointSource, b: CheckpointSource, tolerance: float = 0.0, logits: bool = True, quiet: bool = False
) -> Comparison:
    """Compares two checkpoints of any kind, slice by slice.

    Args:
      a: First checkpoint.
      b: Second checkpoint.
      tolerance: Largest absolute difference of two values that still counts as equal. NaN equals NaN.
      logits: Whether to run both models on a built-in prompt too, if both are complete and of the same shape.
      quiet: Whether to hide the progress bar.
    """
    lines = [
        f"only in {source.location}: {path}"
        for source, other in ((a, b), (b, a))
        for path in source.leaves
        if path not in other.leaves
    ]
    common = {path: (spec.shape, b.leaves[path].shape) for path, spec in a.leaves.items() if path in b.leaves}
    lines += [f"shape of {path}: {first} and {second}" for path, (first, second) in common.items() if first != second]
    same_structure = not lines
    lines += [f"configuration: {text}" for text in _config_differences(a, b)]
    same_shape = [path for path, (first, second) in common.items() if first == second]
    differences = _compare_values(a, b, same_shape, tolerance, quiet)
    if differences:
        leaves = len({path for path, _, _ in differences})
        lines.append(f"values differ in {len(differences)} tensors of {leaves} leaves; the largest differences:")
        largest_first = sorted(differences, key=lambda difference: -difference[1])
        lines += [text for _, _, text in largest_first[:5]]
    equal, num_values = not lines, sum(a.leaves[path].size for path in same_shape)
    summary = [f"compared {num_values:,} values in {len(same_shape)} leaves, tolerance {tolerance:g}"]
    if casts := [path for path in same_shape if a.dtypes[path] != b.dtypes[path]]:
        pair = f"{a.dtypes[casts[0]].name} and {b.dtypes[casts[0]].name}"
        summary.append(f"{len(casts)} leaves have different dtypes ({pair}); compared as float32")
    if not isinstance(a.config, ModelConfig):
        summary.append("masks: not compared, values and settings say all")
    elif logits and same_structure and a.complete and b.complete:
        same, text = _compare_logits(a, b, tolerance)
        equal &= same
        summary.append(text)
    elif logits and same_structure:
        summary.append("logits: not compared, these are not complete models")
    return Comparison(equal, [*lines, *summary, "equal" if equal else "DIFFERENT"])


def _config_differences(a: CheckpointSource, b: CheckpointSource) -> Iterator[str]:
    kinds = {type(source.config) for source in (a, b)}
    if len(kinds) > 1:
        yield f"they are of different models, {' and '.join(sorted(kind.__name__ for kind in kinds))}"
        return
    if isinstance(a.config, Sam2Config):
        yield from config_differences(a.config, b.config)
        return
    if isinstance(a.config, Sa2vaConfig):
        yield from config_differences(a.config.sam2, b.config.sam2)
    configs = [chat_config(source) for source in (a, b)]
    for section, part in (("text", "llm"), ("vision", "vision")):
        if part in a.parts and part in b.parts:
            first, second = (dataclasses.asdict(getattr(config, section)) for config in configs)
            for name in first:
                if name not in _IGNORED_FIELDS and first[name] != second[name]:
                    yield f"{section}.{name} is {first[name]} and {second[name]}"


def _compare_values(
    a: CheckpointSource, b: CheckpointSource, paths: list[str], tolerance: float, quiet: bool
) -> list[tuple[str, float, str]]:
    """Returns the leaf of each tensor that differs, its largest difference, and a line about it."""
    nbytes = {path: a.leaves[path].size * a.dtypes[path].itemsize for path in paths}
    found = []
    with progress_bar(sum(nbytes.values()), "verify", quiet=quiet) as bar:
        for path in paths:
            tensors = a.leaves[path].tensors
            for layer in (tensor.layer for tensor in tensors):
                name = path if layer is None else f"{path}[{layer}]"
                if difference := _compare_slice(a, b, path, layer, name, tolerance):
                    found.append((path, *difference))
                bar.update(nbytes[path] // len(tensors))
    return found


def _compare_slice(
    a: CheckpointSource, b: CheckpointSource, path: str, layer: int | None, name: str, tolerance: float
) -> tuple[float, str] | None:
    """Compares two slices of the same shape, reading them in pieces along their longest axis.

    Returns:
      The largest difference and a line about it, or None if no values differ by more than the tolerance.
    """
    shape = a.leaves[path].slice_shape(layer)
    axis = int(np.argmax(shape))
    step = max(1, _PIECE_ITEMS // max(1, math.prod(shape) // shape[axis]))
    count, largest = 0, []
    for start in range(0, shape[axis], step):
        bounds = [(0, size) for size in shape]
        bounds[axis] = (start, min(start + step, shape[axis]))
        x, y = (np.empty([stop - first for first, stop in bounds], source.dtypes[path]) for source in (a, b))
        for source, out in ((a, x), (b, y)):
            source.read(path, layer, tuple(itertools.starmap(slice, bounds)), out)
        if x.dtype == y.dtype and np.array_equal(bits(x), bits(y)):
            continue
        x, y = x.astype(np.float32), y.astype(np.float32)
        with np.errstate(invalid="ignore"):
            delta = np.abs(x - y)
        delta[(x == y) | (np.isnan(x) & np.isnan(y))] = 0.0
        delta[np.isnan(delta)] = np.inf
        count += int((delta > tolerance).sum())
        index = np.unravel_index(int(delta.argmax()), delta.shape)
        position = [int(i) + (start if dimension == axis else 0) for dimension, i in enumerate(index)]
        largest.append((float(delta[index]), f"{position}: {x[index]:.8g} and {y[index]:.8g}"))
    if not count:
        return None
    difference, where = max(largest, key=lambda piece: piece[0])
    return difference, f"  {name}: {count:,} values, largest difference {difference:.6g} at {where}"


def _compare_logits(a: CheckpointSource, b: CheckpointSource, tolerance: float) -> tuple[bool, str]:
    first, second = builtin_logits(a), builtin_logits(b)
    largest = float(np.abs(first - second).max())
    rms = float(np.sqrt(np.mean(first**2))) or 1.0
    num_same = int((first.argmax(-1) == second.argmax(-1)).sum())
    same = bool(np.array_equal(first, second, equal_nan=True)) or largest <= _LOGITS_FACTOR * tolerance * rms
    text = (
        f"logits on the built-in prompt: largest difference {largest:.6g} (RMS {rms:.4g}), "
        f"top-1 token equal at {num_same} of {len(first)} positions"
    )
    return same, text


def builtin_logits(source: CheckpointSource) -> np.ndarray:
    """Runs a model on a built-in prompt, the same for every model of the same shape.

    Returns:
      [L, vocab] float32 logits of one small image and some text.
    """
    params, config = load(source).params, source.config
    model, side, text_length = VideoLLaMA3(config, dtype=jnp.float32), 4, 16
    num_patches = side * side
    patches = (np.arange(num_patches * config.vision.patch_dim) * 37 % 251).astype(np.uint8)
    text = np.arange(1, text_length + 1) * 7919 % config.text.vocab_size
    slots = np.arange(num_patches)

    @jax.jit
    def run(params, patches, patch_hw, token_patches, tokens, vision_slot):
        patch_segment, segment_ids = jnp.ones(patches.shape[:3], jnp.int32), jnp.ones_like(tokens)
        features = encode(model, params, patches, patch_segment, patch_hw, token_patches)
        positions = jnp.arange(tokens.size)[None]
        hidden, _ = decode(model, params, tokens, features, vision_slot, segment_ids, positions)
        return unembed(model, params, hidden)[0]

    logits = run(
        params,
        patches.reshape(1, 1, num_patches, -1),
        np.stack(np.divmod(slots, side), axis=-1)[None, None],
        np.pad(slots[:, None], ((0, 0), (0, 3)), constant_values=-1)[None],
        np.pad(text, (num_patches, 0))[None],
        np.pad(slots, (0, text_length), constant_values=-1)[None],
    )
    return np.asarray(logits, np.float32)
