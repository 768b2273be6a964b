"""Named tensors in files: the interface shared by safetensors and PyTorch pickles, and the safetensors reader.

`TensorFiles.array(name)` is a view of the memory-mapped file if the file is local, so that reading a checkpoint uses no
anonymous memory.
"""

import abc
import dataclasses
import json
import math
import mmap
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from vl3_jax.checkpoint.paths import is_url, open_url
from vl3_jax.errors import InputError

# Dtypes by their names in a safetensors header; `FLOATS` are those that a model may be stored in.
SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
FLOATS: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library


def float_dtype(name: str) -> np.dtype:
    """Returns the dtype of a name such as "bfloat16" or "bf16"; raises InputError if it is not one of `FLOATS`."""
    aliases = {"bf16": "bfloat16", "f16": "float16", "fp16": "float16", "f32": "float32", "fp32": "float32"}
    dtype = FLOATS.get(aliases.get(str(name), str(name)))
    if dtype is None:
        raise InputError(f"dtype {name!r} is not supported; choose bfloat16, float16 or float32")
    return dtype


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, and the path or URL of the file that contains it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles(abc.ABC):
    """Tensors by name.

    Attributes:
      infos: Shape, dtype and file of each tensor by name.
      paths: Paths or URLs of the files, in order, for fingerprints.
    """

    infos: Mapping[str, TensorInfo]
    paths: Sequence[str]

    @abc.abstractmethod
    def array(self, name: str) -> np.ndarray:
        """Returns the read-only tensor, as a view of the file where possible. Safe to call from several threads."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)


class MappedFile:
    """Local file, memory-mapped on first use."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    def view(self, offset: int, nbytes: int) -> memoryview:
        with self._lock:
            if self._map is None:
                with open(self.path, "rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if nbytes and hasattr(self._map, "madvise"):
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, offset + nbytes - start)
        return memoryview(self._map)[offset : offset + nbytes]


class RemoteFile:
    """File behind an fsspec URL, read by byte ranges. Each call of `view` allocates one buffer."""

    def __init__(self, url: str):
        self.path = url
        self._filesystem, self._key = open_url(url)

    def view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self._filesystem.cat_file(self._key, start=offset, end=offset + nbytes))


class SafetensorsFile(TensorFiles):
    """One `.safetensors` file, whose header is checked against the file size before the file is mapped."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.paths = (self.path,)
        if is_url(path):
            self._file = RemoteFile(self.path)
            size = self._file._filesystem.size(self._file._key)
        else:
            self._file = MappedFile(pathlib.Path(path))
            size = os.path.getsize(path)
        header, start = self._read_header(size)
        self.infos, self._offsets, end = {}, {}, 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            self.infos[name], (tensor_start, tensor_stop) = self._parse_entry(name, entry)
            self._offsets[name] = start + tensor_start
            end = max(end, tensor_stop)
        if start + end != size:
            problem = "truncated" if start + end > size else "longer than its header says"
            raise InputError(
                f"{self.path}: {problem}: {size} bytes, the header describes {start + end}; download the file again"
            )

    def _read_header(self, size: int) -> tuple[dict, int]:
        damaged = f"{self.path}: not a safetensors file"
        if size < 8:
            raise InputError(f"{damaged}: only {size} bytes long; download the file again")
        length = int.from_bytes(self._read(0, 8), "little")
        if length > size - 8 or length > _HEADER_LIMIT:
            raise InputError(
                f"{damaged}: it announces a header of {length} bytes and has {size}; download the file again"
            )
        try:
            header = json.loads(self._read(8, length))
            if not isinstance(header, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise InputError(f"{damaged}: its header is not JSON ({error}); download the file again") from None
        return header, 8 + length

    def _read(self, offset: int, nbytes: int) -> bytes:
        if isinstance(self._file, RemoteFile):
            return bytes(self._file.view(offset, nbytes))
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(nbytes)

    def _parse_entry(self, name: str, entry: dict) -> tuple[TensorInfo, tuple[int, int]]:
        try:
            shape = tuple(int(size) for size in entry["shape"])
            start, stop = (int(offset) for offset in entry["data_offsets"])
            dtype_name = entry["dtype"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.path}: header entry of {name} is damaged ({error}); download it again") from None
        if dtype_name not in SAFETENSORS_DTYPES:
            raise InputError(f"{self.path}: {name} has dtype {dtype_name}; vl3 reads BF16, F16 and F32")
        info = TensorInfo(shape, SAFETENSORS_DTYPES[dtype_name], self.path)
        if start < 0 or stop - start != info.nbytes:
            raise InputError(
                f"{self.path}: {name} of shape {shape} needs {info.nbytes} bytes, its header entry gives "
                f"{stop - start}; download the file again"
            )
        return info, (start, stop)

    def array(self, name: str) -> np.ndarray:
        info = self.infos[name]
        view = self._file.view(self._offsets[name], info.nbytes)
        return np.frombuffer(view, info.dtype).reshape(info.shape)


class Overlay(TensorFiles):
    """Union of several sets of tensors; with `replace`, tensors of a later set replace those of an earlier one."""

    def __init__(self, layers: Sequence[TensorFiles], replace: bool = False):
        self._owner: dict[str, TensorFiles] = {}
        for layer in layers:
            for name in layer:
                if name in self._owner and not replace:
                    first, second = self._owner[name].infos[name].file, layer.infos[name].file
                    raise InputError(f"{second}: {name} is in {first} too; remove one of the two files")
                self._owner[name] = layer
        self.infos = {name: layer.infos[name] for name, layer in self._owner.items()}
        self.paths = tuple(path for layer in layers for path in layer.paths)

    def array(self, name: str) -> np.ndarray:
        return self._owner[name].array(name)


class Renamed(TensorFiles):
    """Tensors under other names: `names` maps new names to old ones, and tensors that it omits are hidden."""

    def __init__(self, base: TensorFiles, names: Mapping[str, str]):
        self._base, self._names = base, dict(names)
        self.infos = {new: base.infos[old] for new, old in self._names.items()}
        self.paths = base.paths

    def array(self, name: str) -> np.ndarray:
        return self._base.array(self._names[name])
