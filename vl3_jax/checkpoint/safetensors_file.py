"""Reads safetensors files, whose headers are refused where the safetensors library refuses them."""

import os

import numpy as np

from vl3_jax.checkpoint.tensors import SAFETENSORS_DTYPES, MappedFile, RemoteFile, TensorFiles, TensorInfo
from vl3_jax.errors import InputError
from vl3_jax.json_file import JsonObject, parse_json, shown
from vl3_jax.storage.paths import is_url

_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
_METADATA = "__metadata__"  # entry of a header that is no tensor
_LARGEST = 2**63 - 1
_DOWNLOAD = "download the file again"


class SafetensorsFile(TensorFiles):
    """One `.safetensors` file, whose header is checked against the file size."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.paths = (self.path,)
        self._file = (RemoteFile if is_url(path) else MappedFile)(self.path)
        header, start = self._read_header()
        entries = {name: self._parse_entry(name, header.section(name)) for name in header if name != _METADATA}
        self.infos = {name: info for name, (info, _) in entries.items()}
        self._offsets = {name: start + offset for name, (_, offset) in entries.items()}
        self._check_offsets(start)

    def _read_header(self) -> tuple[JsonObject, int]:
        """Returns the entries of the header, and the offset of the first tensor."""
        size, damaged = self._file.size, f"{self.path}: not a safetensors file"
        if size < 8:
            raise InputError(f"{damaged}: only {size} bytes long; {_DOWNLOAD}")
        length = int.from_bytes(self._file.view(0, 8), "little")
        if length > min(size - 8, _HEADER_LIMIT):
            raise InputError(f"{damaged}: it announces a header of {length} bytes and has {size}; {_DOWNLOAD}")
        header = parse_json(bytes(self._file.view(8, length)), self.path, _HEADER_LIMIT, unique=True)
        if not isinstance(header, dict):
            raise InputError(f"{damaged}: its header holds {shown(header)}; {_DOWNLOAD}")
        header = JsonObject(header, self.path)
        for key in (metadata := header.section(_METADATA)):
            metadata.text(key)
        return header, 8 + length

    def _parse_entry(self, name: str, entry: JsonObject) -> tuple[TensorInfo, int]:
        """Returns what the header says about a tensor, and its offset from the first one."""
        shape = tuple(entry.integers("shape", high=_LARGEST))
        offsets = entry.integers("data_offsets", high=_LARGEST)
        if not isinstance(entry.get("shape"), list) or len(offsets) != 2:
            raise InputError(f"{self.path}: header entry of {name} is {shown(dict(entry))}; {_DOWNLOAD}")
        if (dtype := SAFETENSORS_DTYPES.get(entry.text("dtype", ""))) is None:
            raise InputError(f"{self.path}: {name} has dtype {shown(entry.get('dtype'))}; vl3 reads BF16, F16 and F32")
        info = TensorInfo(shape, dtype, self.path)
        if offsets[1] - offsets[0] != info.nbytes:
            raise InputError(
                f"{self.path}: {name} of shape {shape} needs {info.nbytes} bytes, its header entry gives "
                f"{offsets[1] - offsets[0]}; {_DOWNLOAD}"
            )
        return info, offsets[0]

    def _check_offsets(self, start: int) -> None:
        """Checks that the tensors follow each other without gaps, as the safetensors library does, up to the end."""
        end = start
        for name in sorted(self.infos, key=lambda name: (self._offsets[name], self.infos[name].nbytes)):
            if self._offsets[name] != end:
                problem = "overlaps another tensor" if self._offsets[name] < end else "follows a gap"
                raise InputError(f"{self.path}: {name} {problem} in the file, by its header; {_DOWNLOAD}")
            end += self.infos[name].nbytes
        if end != self._file.size:
            problem = "truncated" if end > self._file.size else "longer than its header says"
            raise InputError(
                f"{self.path}: {problem}: {self._file.size} bytes, the header describes {end}; {_DOWNLOAD}"
            )

    def array(self, name: str) -> np.ndarray:
        info = self.infos[name]
        view = self._file.view(self._offsets[name], info.nbytes)
        return np.frombuffer(view, info.dtype).reshape(info.shape)
