"""Digests of a converted checkpoint, by which a damaged file is found.

`vl3.json` has, under "digests", a CRC-32 of each array and of each small file, itself included. That of an array is the
CRC-32 of the CRC-32s of its chunks, in the order of their layers and within a layer along the axis that is split: so
chunks can be written, and checked, in any order. CRC-32 finds every flipped bit, and costs a fraction of a hash that
would also withstand an attacker.
"""

import concurrent.futures
import itertools
import json
import pathlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from vl3_jax.checkpoint.name_specs import TensorSpec
from vl3_jax.checkpoint.orbax_tree import MODEL_INFO, OrbaxSource, split_axis
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.errors import InputError
from vl3_jax.json_file import JsonObject, read_object
from vl3_jax.storage.jobs import WORKERS
from vl3_jax.storage.progress import progress_bar

DIGESTS = "digests"  # key of vl3.json
_ARRAYS, _FILES = "arrays", "files"


def chunk_checksums(block: np.ndarray, axis: int, chunk: int) -> list[int]:
    """Returns the CRC-32 of each chunk of a block that is split along an axis into chunks of this size."""
    starts = range(0, block.shape[axis], chunk)
    chunks = (block[(slice(None),) * axis + (slice(start, start + chunk),)] for start in starts)
    return [zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8)) for part in chunks]


def slice_checksums(
    source: CheckpointSource, path: str, layer: int | None, store: ts.TensorStore, dtype: np.dtype
) -> list[int]:
    """Returns the checksums of the chunks that a slice of `source` has in the array `store`, stored as `dtype`."""
    axis, chunk = split_axis(store)
    blocks = source.read_blocks(path, layer, axis, chunk, dtype)
    return [checksum for _, block in blocks for checksum in chunk_checksums(block, axis, chunk)]


def is_checksums(value: Any) -> bool:
    """Returns whether a value of JSON is a list of checksums."""
    return isinstance(value, list) and all(isinstance(item, int) and 0 <= item < 2**32 for item in value)


def array_digest(checksums: Iterable[int]) -> str:
    """Returns the digest of an array from the checksums of its chunks in order."""
    return _text(zlib.crc32(np.array([*checksums], "<u4").tobytes()))


def with_digests(info: str, arrays: Mapping[str, str], files: Mapping[str, bytes]) -> str:
    """Returns the content of `vl3.json` with digests.

    Args:
      info: Content without digests.
      arrays: Digest of each array, by leaf path.
      files: Content of the small files, by their paths in the folder.
    """
    content = json.loads(info)
    digests = {name: _text(zlib.crc32(file)) for name, file in files.items()}
    content[DIGESTS] = {_ARRAYS: dict(arrays), _FILES: digests}
    digests[MODEL_INFO] = _info_digest(content)
    return json.dumps(content, indent=1) + "\n"


def differing(source: CheckpointSource, quiet: bool = False) -> list[str]:
    """Returns the arrays and the small files of a conversion whose content does not have its digest.

    Args:
      source: Orbax folder that `vl3 convert` wrote.
      quiet: Whether to hide the progress bar.

    Raises:
      InputError: The folder has no digests, or a chunk is missing or truncated.
    """
    converted = isinstance(source, OrbaxSource) and source.info_path.parent == source.tree
    info = read_object(source.info_path, missing_ok=False) if converted else JsonObject({}, source.location)
    digests = info.section(DIGESTS)
    arrays, files = digests.section(_ARRAYS), digests.section(_FILES)
    if not digests:
        raise InputError(f"{source.location}: has no digests; the folders that `vl3 convert hf` and `init` write have")
    found = [name for name in files if name != MODEL_INFO and files.text(name) != _file_digest(source.tree / name)]
    if files.text(MODEL_INFO) != _info_digest(info):
        found.append(MODEL_INFO)
    total = sum(spec.size * source.dtypes[path].itemsize for path, spec in source.leaves.items())
    with progress_bar(total, "digests", quiet=quiet) as bar, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for path, spec in source.leaves.items():

            def checksums(tensor: TensorSpec, path: str = path) -> list[int]:
                return slice_checksums(
                    source, path, tensor.layer, source.slice(path, tensor.layer), source.dtypes[path]
                )

            if arrays.text(path) != array_digest(itertools.chain(*pool.map(checksums, spec.tensors))):
                found.append(path)
            bar.update(spec.size * source.dtypes[path].itemsize)
    return found


def _file_digest(file: pathlib.Path | epath.Path) -> str:
    try:
        return _text(zlib.crc32(file.read_bytes())) if file.is_file() else "missing"
    except OSError:
        return "unreadable"


def _info_digest(content: Mapping[str, Any]) -> str:
    """Returns the digest of the content of vl3.json, but for the digest itself."""
    digests = content[DIGESTS]
    files = {name: digest for name, digest in (digests.get(_FILES) or {}).items() if name != MODEL_INFO}
    rest = {**content, DIGESTS: {**digests, _FILES: files}}
    return _text(zlib.crc32(json.dumps(rest, sort_keys=True).encode()))


def _text(checksum: int) -> str:
    return f"crc32:{checksum:08x}"
