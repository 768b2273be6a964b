"""The index of a data set: lengths of every sample, recorded once, so that rows are planned without reading media.

A folder for each fingerprint of settings and content, with plain arrays that are mapped into memory:

    text.npy      [n] int32    text tokens, -1 for a bad sample
    offsets.npy   [n + 1] int64  the media of sample i are media[offsets[i] : offsets[i + 1]]
    media.npy     [m]          is_video, height, width, frames, kept (-1: not counted)
    problems.jsonl             why samples are bad
    index.json                 the settings and the source that it belongs to
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
_MEDIUM = np.dtype([("is_video", "?"), ("height", "<i4"), ("width", "<i4"), ("frames", "<i4"), ("kept", "<i4")])
_ARRAYS = ("text", "offsets", "media")


class Index:
    """A finished index. Pickled, it is its folder."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        try:
            self.text, self.offsets, self.media = (
                np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS
            )
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{self.folder}: not a whole index ({error}); delete it and index again") from None

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, number: int) -> SampleLengths:
        """Lengths of a good sample."""
        media = self.media[self.offsets[number] : self.offsets[number + 1]].tolist()
        return SampleLengths(int(self.text[number]), tuple(MediaInfo(*medium) for medium in media))

    def __iter__(self) -> Iterator[SampleLengths]:
        """All samples in order, bad ones too, fast."""
        for start in range(0, len(self), 2**16):
            stop = min(start + 2**16, len(self))
            offsets = (self.offsets[start : stop + 1] - self.offsets[start]).tolist()
            media = [MediaInfo(*m) for m in self.media[self.offsets[start] : self.offsets[stop]].tolist()]
            for number, text in enumerate(self.text[start:stop].tolist()):
                yield SampleLengths(text, tuple(media[offsets[number] : offsets[number + 1]]))

    @property
    def good(self) -> np.ndarray:
        """[n] bool."""
        return np.asarray(self.text) != BAD

    def problems(self) -> Iterator[SampleError]:
        """Of the bad samples, in order."""
        with open(self.folder / "problems.jsonl", encoding="utf-8") as file:
            yield from map(from_json, file)

    def log(self) -> SampleErrorLog:
        """The problems, counted."""
        log = SampleErrorLog()
        log.add(self.problems(), len(self))
        return log

    def __getstate__(self) -> str:
        return os.fspath(self.folder)

    def __setstate__(self, folder: str) -> None:
        self.__init__(folder)


def index_key(stamp: Sequence[Any], tokenizer: str, settings: DataSettings, kept: bool) -> dict[str, Any]:
    """What an index belongs to. `tokenizer`: a hash of its file; `stamp`: of the source."""
    return {"version": VERSION, "source": list(stamp), "tokenizer": tokenizer, **settings.index_key(kept)}


def find_index(parent: str | os.PathLike, keys: Sequence[dict[str, Any]]) -> Index | None:
    """The index of the first key that has one."""
    for key in keys:
        folder = folder_of(parent, key)
        if (folder / "index.json").exists():
            return Index(folder)
    return None


def folder_of(parent: str | os.PathLike, key: dict[str, Any]) -> pathlib.Path:
    """Where the index of a key lies."""
    return pathlib.Path(parent) / fingerprint(key)


class Part:
    """The index of a stretch of samples, in the making."""

    def __init__(self):
        self.text: list[int] = []
        self.counts: list[int] = []
        self.media: list[tuple] = []
        self.problems: list[SampleError] = []

    def add(self, found: SampleLengths | SampleError) -> None:
        """One sample more."""
        if isinstance(found, SampleError):
            self.text.append(BAD)
            self.counts.append(0)
            self.problems.append(found)
            return
        self.text.append(found.text)
        self.counts.append(len(found.media))
        self.media += [(m.is_video, m.height, m.width, m.frames, m.kept) for m in found.media]

    def save(self, path: pathlib.Path) -> None:
        """Whole or not at all."""
        lines = "".join(to_json(problem) + "\n" for problem in self.problems).encode()
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with open(partial, "wb") as file:
            np.savez(
                file,
                text=np.array(self.text, np.int32),
                counts=np.array(self.counts, np.int32),
                media=np.array(self.media, _MEDIUM),
                problems=np.frombuffer(lines, np.uint8),
            )
        os.replace(partial, path)


def join_parts(parts: Sequence[pathlib.Path], folder: pathlib.Path, key: dict[str, Any]) -> Index:
    """Makes the index of `folder` from its parts, which are removed with the folder they lie in."""
    loaded = [dict(np.load(part)) for part in parts]

    def joined(name: str, dtype: Any) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *[part[name] for part in loaded]])

    arrays = {
        "text": joined("text", np.int32),
        "offsets": np.concatenate([[0], np.cumsum(joined("counts", np.int64))]).astype(np.int64),
        "media": joined("media", _MEDIUM),
    }
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(temporary / f"{name}.npy", array)
    (temporary / "problems.jsonl").write_bytes(b"".join(part["problems"].tobytes() for part in loaded))
    (temporary / "index.json").write_text(json.dumps(key, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    if parts:
        shutil.rmtree(parts[0].parent, ignore_errors=True)
    return Index(folder)
