"""Finds and opens the weight files of a Hugging Face folder and checks that all of them are present."""

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
from vl3_jax.checkpoint.hub import SIDECAR_FILES
from vl3_jax.checkpoint.paths import is_url, list_dir, open_url, translate_io_errors
from vl3_jax.checkpoint.tensors import Overlay, SafetensorsFile, TensorFiles
from vl3_jax.checkpoint.torch_pickle import TorchFile
from vl3_jax.errors import InputError

_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.(safetensors|bin)")


class HfFolder:
    """Hugging Face folder on a local disk or behind a URL that fsspec reads (gs://...).

    Attributes:
      location: Path or URL of the folder.
      remote: Whether the folder is behind a URL.
      names: Sorted names of the files in the folder.
      local: Local folder with the JSON and tokenizer files: the folder itself, or a temporary copy for a URL.
    """

    def __init__(self, location: str | os.PathLike):
        self.location = os.fspath(location).rstrip("/")
        self.remote = is_url(self.location)
        if self.remote:
            self.names = sorted(list_dir(self.location))
            if not self.names:
                raise InputError(f"{location}: no such folder; check the address")
            self.local = self._download_sidecar_files()
        else:
            self.local = pathlib.Path(self.location)
            if not self.local.is_dir():
                raise InputError(f"{location}: no such folder, and not a Hub id (owner/name); check the path")
            self.names = sorted(entry.name for entry in self.local.iterdir() if not entry.name.startswith("."))

    def path(self, name: str) -> str:
        return f"{self.location}/{name}"

    def _download_sidecar_files(self) -> pathlib.Path:
        filesystem, key = open_url(self.location)
        local = pathlib.Path(tempfile.mkdtemp(prefix="vl3-remote-"))
        self._cleanup = weakref.finalize(self, shutil.rmtree, local, ignore_errors=True)
        for name in self.names:
            if name in SIDECAR_FILES or name.endswith(".index.json") or name == "adapter_config.json":
                with translate_io_errors(self.location):
                    filesystem.get_file(f"{key.rstrip('/')}/{name}", os.fspath(local / name))
        return local


def open_weights(folder: HfFolder) -> TensorFiles | None:
    """Opens all weights of a complete model in `folder`; returns None if there are none, as in an adapter folder.

    Safetensors take precedence over pickles, and an index over a single file.

    Raises:
      InputError: A shard is missing or damaged, or the index names a missing file.
    """
    for stem, extension, reader in (("model", "safetensors", SafetensorsFile), ("pytorch_model", "bin", TorchFile)):
        index = f"{stem}.{extension}.index.json"
        single = f"{stem}.{extension}"
        if index in folder.names:
            return _open_indexed(folder, index, reader)
        if single in folder.names:
            return open_file(folder, single, reader)
        shards = [name for name in folder.names if (match := _SHARD.fullmatch(name)) and match[1] == stem]
        shards = [name for name in shards if name.endswith(extension)]
        if shards:
            total = int(_SHARD.fullmatch(shards[0])[3])
            expected = [f"{stem}-{number:05d}-of-{total:05d}.{extension}" for number in range(1, total + 1)]
            _require_files(folder, expected, "the numbering of the other shards")
            return Overlay([open_file(folder, name, reader) for name in expected])
    return None


def open_file(folder: HfFolder, name: str, reader: Callable[[str], TensorFiles]) -> TensorFiles:
    """Opens one weight file with `reader`; an OSError becomes an InputError."""
    path = folder.path(name)
    if folder.remote and reader is TorchFile:
        raise InputError(f"{path}: pickles are read from local folders only; copy it to a local folder first")
    try:
        return reader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None


def _open_indexed(folder: HfFolder, index: str, reader) -> TensorFiles:
    content = read_json(folder.local / index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{folder.path(index)}: contains no weight_map; download the file again")
    files = sorted(set(weight_map.values()))
    if outside := [name for name in files if "/" in name or name.startswith("..")]:
        raise InputError(f"{folder.path(index)}: names {outside[0]!r} outside its folder; download the file again")
    _require_files(folder, files, index)
    shards = {name: open_file(folder, name, reader) for name in files}
    missing = [name for name, file in weight_map.items() if name not in shards[file].infos]
    if missing:
        raise InputError(
            f"{folder.path(index)}: {fold_names(missing)} not in the shard that it names; download the shards again"
        )
    return Overlay(list(shards.values()))


def _require_files(folder: HfFolder, expected: Sequence[str], named_by: str) -> None:
    missing = [name for name in expected if name not in folder.names]
    if missing:
        raise InputError(
            f"{folder.location}: missing shard {', '.join(missing)}, named by {named_by}; download what is missing"
        )


def fold_names(names: Sequence[str]) -> str:
    """Joins names and folds those that differ only in the layer: `model.layers.{0-27}.mlp.up_proj.weight`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"\.(\d+)\.", name)
        pattern = f"{name[: match.start()]}.{{}}.{name[match.end() :]}" if match else name
        groups.setdefault(pattern, []).extend([int(match[1])] if match else [])
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
    """Returns [path, size, modification time] of each file, which a resumed job compares with its own."""
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
