"""Lists the content of a checkpoint, and compares two: names, shapes, configuration, values and logits."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from vl3_jax.checkpoint.load import load_source
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.checkpoint.tensors import bits
from vl3_jax.model import VideoLLaMA3, decode, encode, unembed
from vl3_jax.storage.progress import human_bytes, progress_bar
from vl3_jax.text_table import text_table

_ALIGN = "<<<>>"
_MODULES = {"vision": "vision", "projector": "projector", "llm": "llm", "head": "llm (lm_head)"}

# Configuration fields that neither the parameters nor the forward pass depend on.
_IGNORED_FIELDS = {"max_position_embeddings"}
_PIECE_ITEMS = 2**25
_LOGITS_FACTOR = 10.0  # logits accumulate differences: they may differ by this many tolerances, in units of their RMS


def checkpoint_overview(source: CheckpointSource) -> str:
    """Returns a table of all leaves with shape, dtype, parameters and bytes, and one of the totals."""
    rows = [("leaf", "shape", "dtype", "parameters", "size")]
    totals: dict[str, list[int]] = {}
    for path, spec in source.leaves.items():
        nbytes = spec.size * source.dtypes[path].itemsize
        shape = "x".join(map(str, spec.shape))
        rows.append((path, shape, source.dtypes[path].name, f"{spec.size:,}", human_bytes(nbytes)))
        total = totals.setdefault(_MODULES[spec.part], [0, 0])
        total[0] += spec.size
        total[1] += nbytes
    dtypes = sorted({np.dtype(dtype).name for dtype in source.dtypes.values()})
    summary = [("module", "", "", "parameters", "size")]
    summary += [(name, "", "", f"{size:,}", human_bytes(nbytes)) for name, (size, nbytes) in totals.items()]
    parameters, nbytes = (sum(column) for column in zip(*totals.values(), strict=True))
    summary.append(("total", "", ", ".join(dtypes), f"{parameters:,}", human_bytes(nbytes)))
    tied = "tied" if source.config.text.tie_word_embeddings else "untied"
    title = f"{source.location}: {source.kind} checkpoint"
    if "llm" in source.parts:
        title += f", embeddings {tied}"
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


@dataclasses.dataclass(frozen=True)
class _Difference:
    name: str
    largest: float
    index: tuple[int, ...]
    values: tuple[float, float]
    count: int


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
    common = [path for path in a.leaves if path in b.leaves]
    lines += [
        f"shape of {path}: {a.leaves[path].shape} and {b.leaves[path].shape}"
        for path in common
        if a.leaves[path].shape != b.leaves[path].shape
    ]
    same_structure = not lines
    lines += [f"configuration: {text}" for text in _config_differences(a, b)]
    same_shape = [path for path in common if a.leaves[path].shape == b.leaves[path].shape]
    differences, num_values = _compare_values(a, b, same_shape, tolerance, quiet)
    differences.sort(key=lambda difference: -difference.largest)
    if differences:
        leaves = len({difference.name.split("[")[0] for difference in differences})
        lines.append(f"values differ in {len(differences)} tensors of {leaves} leaves; the largest differences:")
        lines += [_format_difference(difference) for difference in differences[:5]]
    equal = not lines
    casts = [path for path in same_shape if a.dtypes[path] != b.dtypes[path]]
    summary = [f"compared {num_values:,} values in {len(same_shape)} leaves, tolerance {tolerance:g}"]
    if casts:
        pair = f"{a.dtypes[casts[0]].name} and {b.dtypes[casts[0]].name}"
        summary.append(f"{len(casts)} leaves have different dtypes ({pair}); compared as float32")
    if logits and same_structure and a.complete and b.complete:
        same, text = _compare_logits(a, b, tolerance)
        equal &= same
        summary.append(text)
    elif logits and same_structure:
        summary.append("logits: not compared, these are not complete models")
    return Comparison(equal, [*lines, *summary, "equal" if equal else "DIFFERENT"])


def _config_differences(a: CheckpointSource, b: CheckpointSource) -> Iterator[str]:
    sections = [("text", "llm"), ("vision", "vision")]
    for section, part in sections:
        if part not in a.parts or part not in b.parts:
            continue
        first, second = getattr(a.config, section), getattr(b.config, section)
        for field in dataclasses.fields(first):
            values = getattr(first, field.name), getattr(second, field.name)
            if field.name not in _IGNORED_FIELDS and values[0] != values[1]:
                yield f"{section}.{field.name} is {values[0]} and {values[1]}"


def _compare_values(
    a: CheckpointSource, b: CheckpointSource, paths, tolerance: float, quiet: bool
) -> tuple[list[_Difference], int]:
    """Returns the tensors that differ and the number of values compared."""
    differences, num_values = [], sum(a.leaves[path].size for path in paths)
    with progress_bar(
        sum(a.leaves[path].size * a.dtypes[path].itemsize for path in paths), "verify", quiet=quiet
    ) as bar:
        for path in paths:
            for tensor in a.leaves[path].tensors:
                name = path if tensor.layer is None else f"{path}[{tensor.layer}]"
                difference = _compare_slice(a.slice(path, tensor.layer), b.slice(path, tensor.layer), name, tolerance)
                differences += [difference] if difference else []
                bar.update(tensor.size * a.dtypes[path].itemsize)
    return differences, num_values


def _compare_slice(a: ts.TensorStore, b: ts.TensorStore, name: str, tolerance: float) -> _Difference | None:
    """Compares two arrays of the same shape, reading them in pieces along their longest axis.

    Returns:
      The largest difference, or None if no values differ by more than the tolerance.
    """
    axis = int(np.argmax(a.shape))
    step = max(1, _PIECE_ITEMS // max(1, a.size // a.shape[axis]))
    result = None
    for start in range(0, a.shape[axis], step):
        region = (slice(None),) * axis + (slice(start, min(start + step, a.shape[axis])),)
        x, y = (np.asarray(store[region].read().result()) for store in (a, b))
        if x.dtype == y.dtype and np.array_equal(bits(x), bits(y)):
            continue
        x, y = x.astype(np.float32), y.astype(np.float32)
        with np.errstate(invalid="ignore"):
            delta = np.abs(x - y)
        delta[(x == y) | (np.isnan(x) & np.isnan(y))] = 0.0
        delta[np.isnan(delta)] = np.inf
        outside = int((delta > tolerance).sum())
        if not outside:
            continue
        index = np.unravel_index(int(delta.argmax()), delta.shape)
        position = tuple(int(i) + (start if dimension == axis else 0) for dimension, i in enumerate(index))
        count = outside + (result.count if result else 0)
        if result is None or delta[index] > result.largest:
            result = _Difference(name, float(delta[index]), position, (float(x[index]), float(y[index])), count)
        else:
            result = dataclasses.replace(result, count=count)
    return result


def _format_difference(difference: _Difference) -> str:
    first, second = difference.values
    return (
        f"  {difference.name}: {difference.count:,} values, largest difference {difference.largest:.6g} at "
        f"{list(difference.index)}: {first:.8g} and {second:.8g}"
    )


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
    params = load_source(source).params
    config, side, text_length = source.config, 4, 16
    num_patches = side * side
    pixels = (np.arange(num_patches * config.vision.patch_dim) * 37 % 251).astype(np.uint8)
    row, column = np.divmod(np.arange(num_patches), side)
    tokens = np.zeros(num_patches + text_length, np.int32)
    tokens[num_patches:] = np.arange(1, text_length + 1) * 7919 % config.text.vocab_size
    vision_slot = np.concatenate([np.arange(num_patches), np.full(text_length, -1)])
    token_patches = np.stack([np.arange(num_patches), *[np.full(num_patches, -1)] * 3], axis=-1)
    model = VideoLLaMA3(config, dtype=jnp.float32)

    @jax.jit
    def run(params):
        features = encode(
            model,
            params,
            jnp.asarray(pixels.reshape(1, 1, num_patches, -1)),
            jnp.ones((1, 1, num_patches), jnp.int32),
            jnp.asarray(np.stack([row, column], -1)[None, None], jnp.int32),
            jnp.asarray(token_patches[None], jnp.int32),
        )
        length = tokens.size
        hidden, _ = decode(
            model,
            params,
            jnp.asarray(tokens[None]),
            features,
            jnp.asarray(vision_slot[None], jnp.int32),
            jnp.ones((1, length), jnp.int32),
            jnp.arange(length, dtype=jnp.int32)[None],
        )
        return unembed(model, params, hidden)[0]

    return np.asarray(run(params), np.float32)
