"""Making an index: in parallel, and going on where an earlier run was stopped."""

import contextlib
import hashlib
import multiprocessing
import os
import pathlib
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from data_pipelines.examples import Examples
from data_pipelines.index import Index, Part, find_index, folder_of, index_key, join_parts
from data_pipelines.media import Media
from data_pipelines.sources import Source
from vl3_jax.errors import InputError

CHUNK = 1024  # samples; what is lost when a run is killed
CHUNK_KEPT = 32  # the same where media are decoded
_task: tuple | None = None  # of a worker process: source, media, examples, kept


class WorkerDiedError(RuntimeError):
    """A worker process ended by itself: killed from outside, most often for want of memory."""


def build_index(
    source: Source,
    media: Media,
    examples: Examples,
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
    key = index_key(source.stamp(), tokenizer_hash(examples), examples.settings, kept)
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
    chunks = {
        parts_folder / f"{size}-{start:012d}.npz": (start, min(start + size, total)) for start in range(0, total, size)
    }
    missing = {path: span for path, span in chunks.items() if not path.exists()}
    done = total - sum(stop - start for start, stop in missing.values())
    on_progress(done, total)
    task = (source, media, examples, kept)
    with contextlib.closing(_done_chunks(task, missing, workers)) as finished:
        for count in finished:
            done += count
            on_progress(done, total)
    return join_parts(list(chunks), folder, key)


def tokenizer_hash(examples: Examples) -> str:
    """Of the tokenizer file's content."""
    return hashlib.blake2b(pathlib.Path(examples.tokenizer_file).read_bytes(), digest_size=8).hexdigest()


def _done_chunks(task: tuple, chunks: dict[pathlib.Path, tuple[int, int]], workers: int):
    """Yields the size of each chunk when it is on disk."""
    if workers <= 0 or len(chunks) <= 1:
        for path, span in chunks.items():
            yield _index_chunk(task, path, span)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (task,))
    try:
        waiting, left = set(), iter(chunks.items())
        while True:
            for path, span in left:
                waiting.add(pool.submit(_index_in_worker, path, span))
                if len(waiting) >= 2 * workers:
                    break
            if not waiting:
                return
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                yield future.result()
    except BrokenProcessPool as error:
        raise WorkerDiedError(
            "an indexing worker died (killed, perhaps for want of memory); run the command again, with fewer workers "
            "if need be: it goes on where it stopped"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(task: tuple) -> None:
    global _task
    _task = task


def _index_in_worker(path: pathlib.Path, span: tuple[int, int]) -> int:
    return _index_chunk(_task, path, span)


def _index_chunk(task: tuple, path: pathlib.Path, span: tuple[int, int]) -> int:
    source, media, examples, kept = task
    part = Part()
    for number in range(*span):
        part.add(examples.lengths(source[number], media, kept))
    part.save(path)
    return span[1] - span[0]
