"""Making an index: in parallel, and going on where an earlier run was stopped."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable

from data_pipelines.index import Index, Part, find_index, folder_of, index_key, join_parts
from data_pipelines.media_resolver import MediaResolver
from data_pipelines.parallel_map import chunk_ranges, parallel_map
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.sources import RecordSource
from vl3_jax.errors import InputError

CHUNK = 1024  # samples; what is lost when a run is killed
CHUNK_KEPT = 32  # the same where media are decoded


def build_index(
    source: RecordSource,
    media: MediaResolver,
    examples: SampleBuilder,
    parent: str | os.PathLike,
    kept: bool = False,
    workers: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Index:
    """The index of a source, from disk if it is there.

    Args:
      source: of the records.
      media: of their media.
      examples: with tokenizer and settings.
      parent: folder for this and other indices of the source.
      kept: count the vision tokens that pruning leaves, which decodes every video once.
      workers: processes; 0 works in this one.
      on_progress: told how many samples are done, of how many.

    Raises:
      InputError: the folder cannot be written.
      WorkerDiedError: what is done so far is kept.
    """
    key = index_key(source.fingerprint(), tokenizer_hash(examples), examples.settings, kept)
    found = find_index(parent, [key])
    if found is not None:
        on_progress(len(found), len(found))
        return found
    folder = folder_of(parent, key)
    parts_folder = folder.with_name(folder.name + ".parts")
    try:
        parts_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{parts_folder}: {error.strerror}; choose a folder for indices that can be written") from None
    size = CHUNK_KEPT if kept else CHUNK
    total = len(source)
    spans = chunk_ranges(total, size)
    paths = {span: parts_folder / f"{size}-{span[0]:012d}.npz" for span in spans}
    undone = [(*span, paths[span]) for span in spans if not paths[span].exists()]
    done = total - sum(stop - start for start, stop, _ in undone)
    read = source if kept else source.outline()
    on_progress(done, total)
    with contextlib.closing(parallel_map(_index_span, (read, media, examples, kept), undone, workers)) as finished:
        for (start, stop, _), _ in finished:
            done += stop - start
            on_progress(done, total)
    return join_parts(list(paths.values()), folder, key)


def tokenizer_hash(examples: SampleBuilder) -> str:
    """Of the tokenizer file's content."""
    return hashlib.blake2b(pathlib.Path(examples.tokenizer_file).read_bytes(), digest_size=8).hexdigest()


def _index_span(
    source: RecordSource,
    media: MediaResolver,
    examples: SampleBuilder,
    kept: bool,
    start: int,
    stop: int,
    path: pathlib.Path,
) -> None:
    part = Part()
    for number in range(start, stop):
        part.add(examples.lengths(source[number], media, kept))
    part.save(path)
