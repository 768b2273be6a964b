"""The index of a data set: the lengths of all samples, stored once so that packing never has to read media.

Each combination of settings and source content has its own folder, named by a fingerprint. It holds plain arrays, which
are memory-mapped:

    text.npy      [n] int32    text tokens, -1 for a bad sample
    offsets.npy   [n + 1] int64  the media of sample i are media[offsets[i] : offsets[i + 1]]
    media.npy     [m]          is_video, height, width, frames, kept (-1: not counted)
    problems.jsonl             the errors of the bad samples
    index.json                 the settings and the source that the index belongs to
"""

import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.lengths import MediaInfo, SampleLengths
from data_pipelines.sample_errors import SampleError, SampleErrorLog, from_json, to_json
from data_pipelines.settings import DataSettings, fingerprint
from vl3_jax.errors import InputError

BAD = -1
VERSION = 1
_MEDIA_DTYPE = np.dtype([("is_video", "?"), ("height", "<i4"), ("width", "<i4"), ("frames", "<i4"), ("kept", "<i4")])
_ARRAYS = ("text", "offsets", "media")


class Index:
    """A complete index on disk. Pickling stores only its folder."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        try:
            self.text, self.offsets, self.media = (
                np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS
            )
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{self.folder}: the index is incomplete ({error}); delete it and index again") from None

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, number: int) -> SampleLengths:
        """Returns the lengths of a good sample."""
        media = self.media[self.offsets[number] : self.offsets[number + 1]].tolist()
        return SampleLengths(int(self.text[number]), tuple(MediaInfo(*medium) for medium in media))

    def __iter__(self) -> Iterator[SampleLengths]:
        """Yields the lengths of all samples in order, bad ones included; faster than `__getitem__` on each."""
        for start in range(0, len(self), 2**16):
            stop = min(start + 2**16, len(self))
            offsets = (self.offsets[start : stop + 1] - self.offsets[start]).tolist()
            media = [MediaInfo(*m) for m in self.media[self.offsets[start] : self.offsets[stop]].tolist()]
            for number, text in enumerate(self.text[start:stop].tolist()):
                yield SampleLengths(text, tuple(media[offsets[number] : offsets[number + 1]]))

    @property
    def good(self) -> np.ndarray:
        """Which samples are good, [n] bool."""
        return np.asarray(self.text) != BAD

    def errors(self) -> Iterator[SampleError]:
        """Yields the errors of the bad samples in order."""
        with open(self.folder / "problems.jsonl", encoding="utf-8") as file:
            yield from map(from_json, file)

    def log(self) -> SampleErrorLog:
        """Returns a log of all samples and their errors."""
        log = SampleErrorLog()
        log.add(self.errors(), len(self))
        return log

    def __getstate__(self) -> str:
        return os.fspath(self.folder)

    def __setstate__(self, folder: str) -> None:
        self.__init__(folder)


def index_key(source_fingerprint: Sequence[Any], tokenizer: str, settings: DataSettings, kept: bool) -> dict[str, Any]:
    """Returns everything that an index depends on, as JSON.

    Args:
      source_fingerprint: `RecordSource.fingerprint()` of the source.
      tokenizer: A hash of the tokenizer file.
      settings: The data settings.
      kept: Whether the index counts the vision tokens that pruning keeps.
    """
    return {
        "version": VERSION,
        "source": list(source_fingerprint),
        "tokenizer": tokenizer,
        **settings.index_key(kept),
    }


def find_index(parent: str | os.PathLike, keys: Sequence[dict[str, Any]]) -> Index | None:
    """Opens the index of the first key that has one below `parent`; None if no key has."""
    for key in keys:
        folder = folder_for_key(parent, key)
        if (folder / "index.json").exists():
            return Index(folder)
    return None


def folder_for_key(parent: str | os.PathLike, key: dict[str, Any]) -> pathlib.Path:
    """Returns the folder of a key's index below `parent`."""
    return pathlib.Path(parent) / fingerprint(key)


class IndexPart:
    """Collects the lengths of a range of samples while an index is built."""

    def __init__(self):
        self.text: list[int] = []
        self.counts: list[int] = []
        self.media: list[tuple] = []
        self.errors: list[SampleError] = []

    def add(self, lengths: SampleLengths | SampleError) -> None:
        """Appends one sample."""
        if isinstance(lengths, SampleError):
            self.text.append(BAD)
            self.counts.append(0)
            self.errors.append(lengths)
            return
        self.text.append(lengths.text)
        self.counts.append(len(lengths.media))
        self.media += [(m.is_video, m.height, m.width, m.frames, m.kept) for m in lengths.media]

    def save(self, path: pathlib.Path) -> None:
        """Writes the part atomically."""
        lines = "".join(to_json(error) + "\n" for error in self.errors).encode()
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with open(partial, "wb") as file:
            np.savez(
                file,
                text=np.array(self.text, np.int32),
                counts=np.array(self.counts, np.int32),
                media=np.array(self.media, _MEDIA_DTYPE),
                problems=np.frombuffer(lines, np.uint8),
            )
        os.replace(partial, path)


def join_parts(part_files: Sequence[pathlib.Path], folder: pathlib.Path, key: dict[str, Any]) -> Index:
    """Concatenates saved parts into the index of `folder`, then removes the parts together with their folder."""
    parts = [dict(np.load(file)) for file in part_files]

    def concatenated(name: str, dtype: Any) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *[part[name] for part in parts]])

    arrays = {
        "text": concatenated("text", np.int32),
        "offsets": np.concatenate([[0], np.cumsum(concatenated("counts", np.int64))]).astype(np.int64),
        "media": concatenated("media", _MEDIA_DTYPE),
    }
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(temporary / f"{name}.npy", array)
    (temporary / "problems.jsonl").write_bytes(b"".join(part["problems"].tobytes() for part in parts))
    (temporary / "index.json").write_text(json.dumps(key, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    if part_files:
        shutil.rmtree(part_files[0].parent, ignore_errors=True)
    return Index(folder)
