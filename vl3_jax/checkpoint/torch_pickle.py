"""Reads tensors from PyTorch files, the zip archives that `torch.save` writes, without running their code.

A pickle is a program. This reader resolves only the few names that a state dict of tensors needs and refuses a file
that refers to any other. Tensors are views of the memory-mapped archive.
"""

import collections
import os
import pathlib
import pickle
import zipfile
from typing import NamedTuple

import ml_dtypes
import numpy as np

from vl3_jax.checkpoint.tensors import MappedFile, TensorFiles, TensorInfo
from vl3_jax.errors import InputError

_STORAGES = {
    "BFloat16Storage": ml_dtypes.bfloat16,
    "HalfStorage": np.float16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_unused):
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


# What a pickle may refer to: module and name, and what stands for it here.
_NAMES = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_unused: tensor,
    **{("torch", name): np.dtype(dtype) for name, dtype in _STORAGES.items()},
}


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file, path: pathlib.Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str):
        if (module, name) not in _NAMES:
            raise InputError(
                f"{self._path}: refused: its pickle would run {module}.{name}, and vl3 reads tensors only; "
                "ask for safetensors or save a plain state dict"
            )
        return _NAMES[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _location, _size = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise InputError(f"{self._path}: refused: unknown object {kind!r} in its pickle; ask for safetensors")
        return _Storage(str(key), dtype)


class TorchFile(TensorFiles):
    """One file in the zip format (torch 1.6 and newer)."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.paths = (str(path),)
        self._file = MappedFile(self.path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = {entry.filename.split("/", 1)[-1]: entry for entry in archive.infolist()}
                if "data.pkl" not in entries:
                    raise InputError(f"{path}: not a torch file: no data.pkl inside; ask for safetensors")
                if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                    raise InputError(f"{path}: written on a big-endian machine; ask for safetensors")
                with archive.open(entries["data.pkl"]) as stream:
                    state = _TensorUnpickler(stream, self.path).load()
        except zipfile.BadZipFile:
            raise InputError(
                f"{path}: truncated, or in the format of torch before 1.6; download it again or ask for safetensors"
            ) from None
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{path}: its pickle is damaged or not a state dict ({error}); ask for safetensors"
            ) from None
        for wrapper in ("state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        if not isinstance(state, dict) or not all(isinstance(value, _Tensor) for value in state.values()):
            raise InputError(f"{self.path}: not a plain state dict of tensors; save model.state_dict() alone")
        self._tensors: dict[str, _Tensor] = state
        self._offsets = self._storage_offsets(entries)
        self.infos = {}
        for name, tensor in self._tensors.items():
            self._check_bounds(name, tensor)
            self.infos[name] = TensorInfo(tensor.shape, tensor.storage.dtype, str(path))

    def _storage_offsets(self, entries: dict[str, zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
        """Returns the offset and size in bytes of each storage's raw data in the archive, by storage key."""
        offsets = {}
        with open(self.path, "rb") as file:
            for name, entry in entries.items():
                if not name.startswith("data/"):
                    continue
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise InputError(f"{self.path}: its tensors are compressed, unlike torch's; save it again")
                file.seek(entry.header_offset)
                header = file.read(30)  # fixed part of a zip local file header; name and extra lengths at 26 and 28
                lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                offsets[name[len("data/") :]] = (entry.header_offset + 30 + lengths, entry.file_size)
        return offsets

    def _check_bounds(self, name: str, tensor: _Tensor) -> None:
        if tensor.storage.key not in self._offsets:
            raise InputError(f"{self.path}: the data of {name} is not in the file; download it again")
        end = tensor.offset + 1 + sum(s * (n - 1) for s, n in zip(tensor.strides, tensor.shape, strict=True))
        storage_items = self._offsets[tensor.storage.key][1] // tensor.storage.dtype.itemsize
        negative = tensor.offset < 0 or min(tensor.strides, default=0) < 0 or min(tensor.shape, default=1) < 0
        if negative or (0 not in tensor.shape and end > storage_items):
            raise InputError(f"{self.path}: {name} exceeds its data in the file; download the file again")

    def array(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        start, nbytes = self._offsets[tensor.storage.key]
        dtype = tensor.storage.dtype
        flat = np.frombuffer(self._file.view(start, nbytes - nbytes % dtype.itemsize), dtype)
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)
