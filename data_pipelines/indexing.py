"""Builds an index in parallel, resuming where an earlier run was stopped."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable

from data_pipelines.index import Index, IndexPart, find_index, folder_for_key, index_key, join_parts
from data_pipelines.media_resolver import MediaResolver
from data_pipelines.parallel_map import chunk_ranges, parallel_map
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.sources import RecordSource
from vl3_jax.errors import InputError

CHUNK = 1024  # samples per part; a killed run loses at most the parts in progress
CHUNK_KEPT = 32  # the same where media are decoded


def build_index(
    source: RecordSource,
    media: MediaResolver,
    sample_builder: SampleBuilder,
    parent: str | os.PathLike,
    kept: bool = False,
    workers: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Index:
    """Returns the index of a source; builds it unless it is on disk already.

    Args:
      source: The records.
      media: Resolves the media of the records.
      sample_builder: Provides the tokenizer and the settings.
      parent: Folder that holds this and other indices of the source.
      kept: Count the vision tokens that pruning keeps, which decodes every video once.
      workers: Number of worker processes; 0 works in this process.
      on_progress: Called with the number of samples indexed and the total.

    Raises:
      InputError: The folder cannot be written.
      WorkerDiedError: A worker process died; finished parts are kept for the next call.
    """
    key = index_key(source.fingerprint(), tokenizer_hash(sample_builder), sample_builder.settings, kept)
    index = find_index(parent, [key])
    if index is not None:
        on_progress(len(index), len(index))
        return index
    folder = folder_for_key(parent, key)
    parts_folder = folder.with_name(folder.name + ".parts")
    try:
        parts_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{parts_folder}: {error.strerror}; choose a folder for indices that can be written") from None
    size = CHUNK_KEPT if kept else CHUNK
    total = len(source)
    ranges = chunk_ranges(total, size)
    part_files = {chunk: parts_folder / f"{size}-{chunk[0]:012d}.npz" for chunk in ranges}
    pending = [(*chunk, part_files[chunk]) for chunk in ranges if not part_files[chunk].exists()]
    done = total - sum(stop - start for start, stop, _ in pending)
    records = source if kept else source.outline()
    on_progress(done, total)
    shared = (records, media, sample_builder, kept)
    with contextlib.closing(parallel_map(_index_range, shared, pending, workers)) as finished:
        for (start, stop, _), _ in finished:
            done += stop - start
            on_progress(done, total)
    return join_parts(list(part_files.values()), folder, key)


def tokenizer_hash(sample_builder: SampleBuilder) -> str:
    """Returns a hash of the content of the tokenizer file."""
    return hashlib.blake2b(pathlib.Path(sample_builder.tokenizer_file).read_bytes(), digest_size=8).hexdigest()


def _index_range(
    source: RecordSource,
    media: MediaResolver,
    sample_builder: SampleBuilder,
    kept: bool,
    start: int,
    stop: int,
    path: pathlib.Path,
) -> None:
    part = IndexPart()
    for number in range(start, stop):
        part.add(sample_builder.lengths(source[number], media, kept))
    part.save(path)
