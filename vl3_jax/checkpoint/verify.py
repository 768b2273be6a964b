"""Comparing two checkpoints: names, shapes, values, then what the models answer."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorstore as ts

from vl3_jax.checkpoint.progress import progress_bar
from vl3_jax.checkpoint.sources import CheckpointSource

# Sizes that the parameters and the forward pass do not depend on.
_HARMLESS = {"max_position_embeddings"}
_PIECE_ITEMS = 2**25
_LOGITS_SLACK = 10.0  # logits sum over the model: they may differ by this many tolerances, in units of their RMS


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Outcome of `compare`.

    Attributes:
      equal: nothing differs by more than the tolerance.
      lines: what a person should read, the worst first.
    """

    equal: bool
    lines: list[str]


@dataclasses.dataclass(frozen=True)
class _Difference:
    place: str
    worst: float
    index: tuple[int, ...]
    values: tuple[float, float]
    count: int


def compare(
    a: CheckpointSource, b: CheckpointSource, tolerance: float = 0.0, logits: bool = True, quiet: bool = False
) -> Comparison:
    """Compares two checkpoints of any kind, slice by slice.

    Args:
      a, b: the checkpoints.
      tolerance: largest absolute difference of two values that still counts as equal; NaN equals NaN.
      logits: also run both models, where both are whole and of the same shape, on a built-in prompt.
      quiet: no progress bar.
    """
    lines = [f"only in {one.location}: {path}" for one, other in ((a, b), (b, a)) for path in _absent(one, other)]
    common = [path for path in a.leaves if path in b.leaves]
    lines += [
        f"shape of {path}: {a.leaves[path].shape} and {b.leaves[path].shape}"
        for path in common
        if a.leaves[path].shape != b.leaves[path].shape
    ]
    fits = not lines
    lines += [f"configuration: {text}" for text in _config_differences(a, b)]
    same_shape = [path for path in common if a.leaves[path].shape == b.leaves[path].shape]
    found, values = _compare_values(a, b, same_shape, tolerance, quiet)
    found.sort(key=lambda difference: -difference.worst)
    if found:
        leaves = len({difference.place.split("[")[0] for difference in found})
        lines.append(f"values differ in {len(found)} tensors of {leaves} leaves; the most:")
        lines += [_describe(difference) for difference in found[:5]]
    equal = not lines
    casts = [path for path in same_shape if a.dtypes[path] != b.dtypes[path]]
    summary = [f"compared {values:,} values in {len(same_shape)} leaves, tolerance {tolerance:g}"]
    if casts:
        pair = f"{a.dtypes[casts[0]].name} and {b.dtypes[casts[0]].name}"
        summary.append(f"note: {len(casts)} leaves have different dtypes ({pair}); compared as float32")
    if logits and fits and a.complete and b.complete:
        same, text = _compare_logits(a, b, tolerance)
        equal &= same
        summary.append(text)
    elif logits and fits:
        summary.append("logits: not compared, these are not whole models")
    return Comparison(equal, [*lines, *summary, "equal" if equal else "DIFFERENT"])


def _absent(one: CheckpointSource, other: CheckpointSource) -> list[str]:
    return [path for path in one.leaves if path not in other.leaves]


def _config_differences(a: CheckpointSource, b: CheckpointSource) -> Iterator[str]:
    sections = [("text", "llm"), ("vision", "vision")]
    for section, part in sections:
        if part not in a.parts or part not in b.parts:
            continue
        first, second = getattr(a.config, section), getattr(b.config, section)
        for field in dataclasses.fields(first):
            values = getattr(first, field.name), getattr(second, field.name)
            if field.name not in _HARMLESS and values[0] != values[1]:
                yield f"{section}.{field.name} is {values[0]} and {values[1]}"


def _compare_values(
    a: CheckpointSource, b: CheckpointSource, paths, tolerance: float, quiet: bool
) -> tuple[list[_Difference], int]:
    found, count = [], sum(a.leaves[path].size for path in paths)
    with progress_bar(
        sum(a.leaves[path].size * a.dtypes[path].itemsize for path in paths), "verify", quiet=quiet
    ) as bar:
        for path in paths:
            for tensor in a.leaves[path].tensors:
                place = path if tensor.layer is None else f"{path}[{tensor.layer}]"
                difference = _compare_slice(a.slice(path, tensor.layer), b.slice(path, tensor.layer), place, tolerance)
                found += [difference] if difference else []
                bar.update(tensor.size * a.dtypes[path].itemsize)
    return found, count


def _compare_slice(a: ts.TensorStore, b: ts.TensorStore, place: str, tolerance: float) -> _Difference | None:
    """The largest difference of two equally shaped arrays, read in pieces along their longest axis."""
    axis = int(np.argmax(a.shape))
    step = max(1, _PIECE_ITEMS // max(1, a.size // a.shape[axis]))
    result = None
    for start in range(0, a.shape[axis], step):
        part = (slice(None),) * axis + (slice(start, min(start + step, a.shape[axis])),)
        x, y = (np.asarray(store[part].read().result()) for store in (a, b))
        if x.dtype == y.dtype and np.array_equal(_bits(x), _bits(y)):
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
        total = tuple(int(i) + (start if dimension == axis else 0) for dimension, i in enumerate(index))
        count = outside + (result.count if result else 0)
        if result is None or delta[index] > result.worst:
            result = _Difference(place, float(delta[index]), total, (float(x[index]), float(y[index])), count)
        else:
            result = dataclasses.replace(result, count=count)
    return result


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def _describe(difference: _Difference) -> str:
    first, second = difference.values
    return (
        f"  {difference.place}: {difference.count:,} values, largest difference {difference.worst:.6g} at "
        f"{list(difference.index)}: {first:.8g} and {second:.8g}"
    )


def _compare_logits(a: CheckpointSource, b: CheckpointSource, tolerance: float) -> tuple[bool, str]:
    first, second = builtin_logits(a), builtin_logits(b)
    worst = float(np.abs(first - second).max())
    scale = float(np.sqrt(np.mean(first**2))) or 1.0
    agree = int((first.argmax(-1) == second.argmax(-1)).sum())
    same = bool(np.array_equal(first, second, equal_nan=True)) or worst <= _LOGITS_SLACK * tolerance * scale
    text = (
        f"logits on the built-in prompt: largest difference {worst:.6g} (RMS {scale:.4g}), "
        f"best token equal at {agree} of {len(first)} positions"
    )
    return same, text


def builtin_logits(source: CheckpointSource) -> np.ndarray:
    """[L, vocab] float32 logits of one small picture and some text, the same for every model of the same shape."""
    import jax
    import jax.numpy as jnp

    from vl3_jax.checkpoint.load import load_source
    from vl3_jax.model import VideoLLaMA3, decode, encode, unembed

    params = load_source(source).params
    config, side, text = source.config, 4, 16
    patches = side * side
    pixels = (np.arange(patches * config.vision.patch_dim) * 37 % 251).astype(np.uint8)
    row, column = np.divmod(np.arange(patches), side)
    tokens = np.zeros(patches + text, np.int32)
    tokens[patches:] = np.arange(1, text + 1) * 7919 % config.text.vocab_size
    slots = np.concatenate([np.arange(patches), np.full(text, -1)])
    token_patches = np.stack([np.arange(patches), *[np.full(patches, -1)] * 3], axis=-1)
    model = VideoLLaMA3(config, dtype=jnp.float32)

    @jax.jit
    def run(params):
        features = encode(
            model,
            params,
            jnp.asarray(pixels.reshape(1, 1, patches, -1)),
            jnp.ones((1, 1, patches), jnp.int32),
            jnp.asarray(np.stack([row, column], -1)[None, None], jnp.int32),
            jnp.asarray(token_patches[None], jnp.int32),
        )
        length = tokens.size
        hidden, _ = decode(
            model,
            params,
            jnp.asarray(tokens[None]),
            features,
            jnp.asarray(slots[None], jnp.int32),
            jnp.ones((1, length), jnp.int32),
            jnp.arange(length, dtype=jnp.int32)[None],
        )
        return unembed(model, params, hidden)[0]

    return np.asarray(run(params), np.float32)
