"""The weight files of a Hugging Face folder: which ones count, and whether all of them are there."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence

from vl3_jax.checkpoint.hf_config import read_json
from vl3_jax.checkpoint.hub import CARRIED_FILES
from vl3_jax.checkpoint.paths import is_url, list_dir, open_url, translate_io_errors
from vl3_jax.checkpoint.tensors import Overlay, SafetensorsFile, TensorFiles
from vl3_jax.checkpoint.torch_pickle import TorchFile
from vl3_jax.errors import InputError

_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.(safetensors|bin)")


class HfFolder:
    """A local folder or a URL that fsspec reads (gs://...): names, full paths, and local copies of small files."""

    def __init__(self, location: str | os.PathLike):
        self.location = os.fspath(location).rstrip("/")
        self.remote = is_url(self.location)
        if self.remote:
            self.names = sorted(list_dir(self.location))
            if not self.names:
                raise InputError(f"{location}: no such folder; check the address")
            self.local = self._fetch_small()
        else:
            self.local = pathlib.Path(self.location)
            if not self.local.is_dir():
                raise InputError(f"{location}: no such folder, and not a Hub id (owner/name); check the path")
            self.names = sorted(entry.name for entry in self.local.iterdir() if not entry.name.startswith("."))

    def path(self, name: str) -> str:
        return f"{self.location}/{name}"

    def _fetch_small(self) -> pathlib.Path:
        filesystem, key = open_url(self.location)
        local = pathlib.Path(tempfile.mkdtemp(prefix="vl3-remote-"))
        self._cleanup = weakref.finalize(self, shutil.rmtree, local, ignore_errors=True)
        for name in self.names:
            if name in CARRIED_FILES or name.endswith(".index.json") or name == "adapter_config.json":
                with translate_io_errors(self.location):
                    filesystem.get_file(f"{key.rstrip('/')}/{name}", os.fspath(local / name))
        return local


def open_weights(folder: HfFolder) -> TensorFiles | None:
    """All weights of a complete model in `folder`, or None where there are none (an adapter, say).

    Safetensors win over pickles, an index over a single file.

    Raises:
      InputError: a shard that is missing, an index that names a file that is not there, a damaged file.
    """
    for stem, extension, reader in (("model", "safetensors", SafetensorsFile), ("pytorch_model", "bin", TorchFile)):
        index = f"{stem}.{extension}.index.json"
        single = f"{stem}.{extension}"
        if index in folder.names:
            return _open_indexed(folder, index, reader)
        if single in folder.names:
            return open_file(folder, single, reader)
        shards = [name for name in folder.names if (found := _SHARD.fullmatch(name)) and found[1] == stem]
        shards = [name for name in shards if name.endswith(extension)]
        if shards:
            total = int(_SHARD.fullmatch(shards[0])[3])
            wanted = [f"{stem}-{number:05d}-of-{total:05d}.{extension}" for number in range(1, total + 1)]
            _require_files(folder, wanted, "the numbering of the other shards")
            return Overlay([open_file(folder, name, reader) for name in wanted])
    return None


def open_file(folder: HfFolder, name: str, reader: Callable[[str], TensorFiles]) -> TensorFiles:
    """Opens one weight file; a file system's refusal becomes an InputError."""
    path = folder.path(name)
    if folder.remote and reader is TorchFile:
        raise InputError(f"{path}: pickles are read from local folders only; copy it here first")
    try:
        return reader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None


def _open_indexed(folder: HfFolder, index: str, reader) -> TensorFiles:
    content = read_json(folder.local / index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{folder.path(index)}: no weight_map in it; download the file again")
    files = sorted(set(weight_map.values()))
    if outside := [name for name in files if "/" in name or name.startswith("..")]:
        raise InputError(f"{folder.path(index)}: names {outside[0]!r} outside its folder; download the file again")
    _require_files(folder, files, index)
    shards = {name: open_file(folder, name, reader) for name in files}
    lost = [name for name, file in weight_map.items() if name not in shards[file].infos]
    if lost:
        raise InputError(
            f"{folder.path(index)}: {fold_names(lost)} not in the shard that it names; download the shards again"
        )
    return Overlay(list(shards.values()))


def _require_files(folder: HfFolder, wanted: Sequence[str], named_by: str) -> None:
    missing = [name for name in wanted if name not in folder.names]
    if missing:
        raise InputError(
            f"{folder.location}: missing shard {', '.join(missing)}, named by {named_by}; download the rest"
        )


def fold_names(names: Sequence[str]) -> str:
    """Names in one line, those that differ by a layer number folded: `model.layers.{0-27}.mlp.up_proj.weight`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        pattern = f"{name[: found.start()]}.{{}}.{name[found.end() :]}" if found else name
        groups.setdefault(pattern, []).extend([int(found[1])] if found else [])
    return ", ".join(pattern.replace("{}", _ranges(numbers), 1) for pattern, numbers in groups.items())


def _ranges(numbers: Sequence[int]) -> str:
    numbers = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def file_fingerprints(paths: Sequence[str]) -> list[list]:
    """[path, size, modification time] of each file: what a resumed job compares with."""
    fingerprints = []
    for path in paths:
        if is_url(path):
            filesystem, key = open_url(path)
            info = filesystem.info(key)
            fingerprints.append(
                [path, info["size"], str(info.get("mtime") or info.get("updated") or info.get("created"))]
            )
        else:
            with contextlib.suppress(OSError):
                status = os.stat(path)
                fingerprints.append([os.path.realpath(path), status.st_size, status.st_mtime_ns])
    return json.loads(json.dumps(fingerprints))
