"""Opens sources by their file names, or by a given kind."""

import glob
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.sample_errors import one_line
from data_pipelines.sources.base import RecordSource
from data_pipelines.sources.tfds_source import folder_and_split
from vl3_jax.errors import InputError
from vl3_jax.storage.file_digests import FileDigests

# Kind -> module and class, imported at first use because the libraries of some may be missing, and file endings.
KINDS = {
    "annotations": ("sources.annotation_file", "AnnotationFile", (".json", ".jsonl")),
    "array_record": ("sources.array_records", "ArrayRecords", (".array_record", ".arrayrecord")),
    "tfds": ("sources.tfds_source", "TfdsSource", ()),
    "webdataset": ("sources.webdataset", "WebDataset", (".tar",)),
    "parquet": ("sources.parquet", "ParquetFile", (".parquet",)),
    "synthetic": ("synthetic.source", "SyntheticSource", ()),
}


class Concatenated(RecordSource):
    """Several sources as one, in order."""

    def __init__(self, sources: Sequence[RecordSource]):
        super().__init__()
        self._sources = list(sources)
        self._firsts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def where(self, index: int) -> str:
        source, local = self._locate(index)
        return source.where(local)

    def read(self, index: int) -> Mapping[str, Any]:
        source, local = self._locate(index)
        return source.read(local)

    def fingerprint(self, digests: FileDigests) -> list:
        return [source.fingerprint(digests) for source in self._sources]

    def _locate(self, index: int) -> tuple[RecordSource, int]:
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._sources[number], index - int(self._firsts[number])


def open_source(paths: str | Sequence[str], kind: str | None = None) -> RecordSource:
    """Opens files as one source.

    Args:
      paths: One path or several; a local one may contain `*`. A TFDS path is the version folder, followed by
        `:train[:50%]` for a split.
      kind: One of `KINDS`; inferred from the file name by default.

    Raises:
      InputError: No such file, one without records, or an unknown kind; names the path.
    """
    names = [name for path in ([paths] if isinstance(paths, str) else paths) for name in _expand(path)]
    opened = [_open(name, kind or _infer_kind(name)) for name in names]
    return opened[0] if len(opened) == 1 else Concatenated(opened)


def _expand(path: str) -> list[str]:
    path = os.path.expanduser(path)
    if "*" not in path or "://" in path:
        return [path]
    matches = sorted(glob.glob(path))
    if not matches:
        raise InputError(f"{path}: no file matches; check the path")
    return matches


def _infer_kind(path: str) -> str | None:
    if path.startswith("synthetic://"):
        return "synthetic"
    for kind, (_, _, suffixes) in KINDS.items():
        if path.lower().endswith(suffixes):
            return kind
    if ".array_record-" in path or ".arrayrecord-" in path:  # name.array_record-00000-of-00010
        return "array_record"
    if os.path.exists(os.path.join(folder_and_split(path)[0], "dataset_info.json")):
        return "tfds"
    return None


def _open(path: str, kind: str | None) -> RecordSource:
    if kind and kind not in KINDS:
        raise InputError(f"{path}: unknown kind {kind!r}; use one of {', '.join(KINDS)}")
    if kind != "tfds" and "://" not in path and not os.path.exists(path):
        raise InputError(f"{path}: no such file; check the path")
    if kind is None:
        raise InputError(f"{path}: unknown kind of data; give the kind, one of {', '.join(KINDS)}")
    module, name, _ = KINDS[kind]
    try:
        source = getattr(importlib.import_module(f"data_pipelines.{module}"), name)(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or one_line(error)}; check the file") from None
    if not len(source):
        raise InputError(f"{path}: no records; the file is empty or not complete")
    return source
