"""The index of a data set: the lengths of all samples, stored once so that packing never has to read media.

Each combination of settings and source content has its own folder, named by a fingerprint. It holds plain arrays, which
are memory-mapped:

    text.npy      [n] int32    text tokens, -1 for a bad sample
    offsets.npy   [n + 1] int64  the media of sample i are media[offsets[i] : offsets[i + 1]]
    media.npy     [m]          is_video, height, width, frames, kept (-1: not counted)
    problems.jsonl             the errors of the bad samples
    counts.json                what was read from the good samples
    index.json                 the settings and the source that the index belongs to

An index is built in parts, so that a run which was stopped is resumed.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.packing.lengths import BAD, MediaInfo, SampleLengths
from data_pipelines.parallel_map import chunk_ranges, parallel_map
from data_pipelines.record_counts import RecordCounts
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.sample_errors import MISSING, SampleError, from_json_lines, to_json_lines
from data_pipelines.settings import fingerprint
from data_pipelines.sources import RecordSource
from data_pipelines.sources.media_resolver import MediaResolver
from vl3_jax.errors import InputError
from vl3_jax.storage.disk_space import translate_full_disk
from vl3_jax.storage.durable import rename
from vl3_jax.storage.file_digests import FileDigests
from vl3_jax.storage.locks import hold

VERSION = 3
CHUNK = 1024  # samples per part; a killed run loses at most the parts in progress
CHUNK_KEPT = 32  # the same where media are decoded
_MEDIA_DTYPE = np.dtype([("is_video", "?"), ("height", "<i4"), ("width", "<i4"), ("frames", "<i4"), ("kept", "<i4")])


class Index:
    """A complete index on disk. Pickling stores only its folder."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        try:
            self.text, self.offsets, self.media = (
                np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("text", "offsets", "media")
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
        for start, stop in chunk_ranges(len(self), 2**16):
            offsets = (self.offsets[start : stop + 1] - self.offsets[start]).tolist()
            media = [MediaInfo(*m) for m in self.media[self.offsets[start] : self.offsets[stop]].tolist()]
            for number, text in enumerate(self.text[start:stop].tolist()):
                yield SampleLengths(text, tuple(media[offsets[number] : offsets[number + 1]]))

    @property
    def kept(self) -> bool:
        """Whether the vision tokens that pruning keeps are counted."""
        return json.loads((self.folder / "index.json").read_text())["kept"]

    @property
    def good(self) -> np.ndarray:
        """Which samples are good, [n] bool."""
        return np.asarray(self.text) != BAD

    def errors(self) -> list[SampleError]:
        """Returns the errors of the bad samples in order."""
        return from_json_lines((self.folder / "problems.jsonl").read_text(encoding="utf-8"))

    def is_stale(self, media: MediaResolver) -> bool:
        """Returns whether other samples would be good now: other media may be read, or files that were missing."""
        root, *allowed = json.loads((self.folder / "index.json").read_text())["media"]
        if [root, *allowed] == media.identity:
            return any(error.kind == MISSING and os.path.exists(error.file) for error in self.errors())
        return allowed != media.identity[1:] or any(error.kind == MISSING for error in self.errors())

    def counts(self) -> RecordCounts:
        """Returns what was read from the good samples."""
        return RecordCounts.from_json(json.loads((self.folder / "counts.json").read_text(encoding="utf-8")))

    def __reduce__(self):
        return Index, (self.folder,)


def find_index(
    source: RecordSource, sample_builder: SampleBuilder, parent: str | os.PathLike, kept: Sequence[bool]
) -> Index | None:
    """Opens the index of a source with the first of several values of `kept` that has one below `parent`."""
    content = _content(source, parent)
    for value in kept:
        folder = pathlib.Path(parent) / fingerprint(_index_key(content, sample_builder, value))
        if (folder / "index.json").exists():
            return Index(folder)
    return None


def build_index(
    source: RecordSource,
    media: MediaResolver,
    sample_builder: SampleBuilder,
    parent: str | os.PathLike,
    kept: bool = False,
    workers: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    wait: bool = False,
) -> Index:
    """Returns the index of a source; builds it unless it is on disk already and not stale.

    Args:
      source: The records.
      media: Resolves the media of the records.
      sample_builder: Provides the tokenizer and the settings.
      parent: Folder that holds this and other indices of the source.
      kept: Count the vision tokens that pruning keeps, which decodes every video once.
      workers: Number of worker processes; 0 works in this process.
      on_progress: Called with the number of samples indexed and the total.
      wait: Whether to wait for another process that builds the same index, and to use what it has built.

    Raises:
      InputError: The folder cannot be written, or another process is building the same index.
      WorkerDiedError: A worker process died; finished parts are kept for the next call.
    """
    index = find_index(source, sample_builder, parent, [kept])
    if index is not None and not index.is_stale(media):
        on_progress(len(index), len(index))
        return index
    key = _index_key(_content(source, parent), sample_builder, kept)
    folder = pathlib.Path(parent) / fingerprint(key)
    parts_folder = folder.with_name(f"{folder.name}.{fingerprint(media.identity)}.parts")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(parts_folder, wait=wait))
        except OSError as error:
            raise InputError(
                f"{parts_folder}: {error.strerror}; choose a folder for indices that can be written"
            ) from None
        index = find_index(source, sample_builder, parent, [kept])
        if index is not None and not index.is_stale(media):  # built by the process that this one has waited for
            on_progress(len(index), len(index))
            shutil.rmtree(parts_folder, ignore_errors=True)
            return index
        size = CHUNK_KEPT if kept else CHUNK
        ranges = chunk_ranges(len(source), size)
        parts = [parts_folder / f"{size}-{start:012d}.npz" for start, _ in ranges]
        pending = [(*chunk, part) for chunk, part in zip(ranges, parts, strict=True) if not part.exists()]
        measure = functools.partial(sample_builder.measure, media=media, kept=kept)
        index_range = functools.partial(_index_range, source if kept else source.outline(), measure)
        with translate_full_disk(folder):
            parallel_map(index_range, pending, len(source), workers, on_progress)
            _join_parts(parts, folder, key | {"media": media.identity})
        shutil.rmtree(parts_folder, ignore_errors=True)
        return Index(folder)


def _content(source: RecordSource, parent: str | os.PathLike) -> list[Any]:
    """Returns the fingerprint of a source; the digests of its files are kept beside its indices."""
    return source.fingerprint(FileDigests(pathlib.Path(parent) / "digests.json"))


def _index_key(content: list[Any], sample_builder: SampleBuilder, kept: bool) -> dict[str, Any]:
    """Returns everything that an index depends on, as JSON; `content` is the fingerprint of the source."""
    settings = sample_builder.settings.index_key(kept)
    return {"version": VERSION, "source": content, "tokenizer": sample_builder.tokenizer_hash, **settings}


def _index_range(source: RecordSource, measure: Callable, start: int, stop: int, path: pathlib.Path) -> None:
    """Writes the lengths of a range of samples, as `measure` gives them for each record, atomically."""
    results = [measure(source[number]) for number in range(start, stop)]
    errors = [result for result in results if isinstance(result, SampleError)]
    lengths = [SampleLengths(BAD) if isinstance(result, SampleError) else result[0] for result in results]
    counts = RecordCounts()
    counts.add(result[1] for result in results if not isinstance(result, SampleError))
    media_rows = [(m.is_video, m.height, m.width, m.frames, m.kept) for sample in lengths for m in sample.media]
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.savez(
            file,
            text=np.array([sample.text for sample in lengths], np.int32),
            counts=np.array([len(sample.media) for sample in lengths], np.int32),
            media=np.array(media_rows, _MEDIA_DTYPE),
            problems=np.frombuffer(to_json_lines(errors).encode(), np.uint8),
            counted=np.frombuffer(json.dumps(counts.to_json()).encode(), np.uint8),
        )
    rename(partial, path)


def _read_part(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return dict(np.load(file))
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{file}: a damaged part of an index; remove it and index again") from None


def _join_parts(part_files: Sequence[pathlib.Path], folder: pathlib.Path, key: dict[str, Any]) -> None:
    """Concatenates saved parts into the index of `folder`."""
    parts = [_read_part(file) for file in part_files]

    def concatenated(name: str, dtype: Any) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *[part[name] for part in parts]])

    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    np.save(temporary / "text.npy", concatenated("text", np.int32))
    np.save(temporary / "offsets.npy", np.insert(np.cumsum(concatenated("counts", np.int64)), 0, 0))
    np.save(temporary / "media.npy", concatenated("media", _MEDIA_DTYPE))
    (temporary / "problems.jsonl").write_bytes(b"".join(part["problems"].tobytes() for part in parts))
    counts = RecordCounts()
    counts.add(RecordCounts.from_json(json.loads(part["counted"].tobytes())) for part in parts)
    (temporary / "counts.json").write_text(json.dumps(counts.to_json(), indent=1) + "\n")
    (temporary / "index.json").write_text(json.dumps(key, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    rename(temporary, folder)
