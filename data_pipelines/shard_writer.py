"""Writes annotations and media into ArrayRecord shards: few large files with random access."""

import contextlib
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines.layouts import TAG_OF, VIDEO_OPTIONS, official
from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.parallel_map import chunk_ranges, parallel_map
from data_pipelines.sample_errors import BAD_RECORD, BadSampleError, SampleError
from data_pipelines.sources import Record, RecordSource, array_records, map_record
from data_pipelines.sources.media_resolver import MediaResolver
from vl3_jax.errors import InputError
from vl3_jax.processing.media_source import MediaBytes
from vl3_jax.storage.disk_space import translate_full_disk
from vl3_jax.storage.durable import rename
from vl3_jax.storage.locks import LOCK, hold

_OPTIONS = "group_size:1"  # with larger groups, reading one record reads its neighbours too


def write(
    spec: DatasetSpec,
    folder: str | os.PathLike,
    samples_per_shard: int = 4096,
    workers: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[pathlib.Path], int, list[SampleError]]:
    """Writes `<name>.array_record-00000-of-00010`, ...; shards that are complete already are kept.

    Args:
      spec: The data set.
      folder: Folder of the shards.
      samples_per_shard: Samples in a shard; fewer for long videos, so that a shard stays below a few GB.
      workers: Number of worker processes; 0 works in this process.
      on_progress: Called with the number of samples written and the total.

    Returns:
      The shards, the number of samples processed by this call, and the errors of those that were left out.

    Raises:
      InputError: There is nothing to write, the folder cannot be written, or another process is writing the data set.
      WorkerDiedError: A worker process died; complete shards are kept.
    """
    source = spec.open()
    ranges = chunk_ranges(len(source), samples_per_shard)
    if not ranges:
        raise InputError(f"{spec.annotations[0]}: no samples to write")
    folder = pathlib.Path(folder)
    shards = [folder / f"{spec.name}.array_record-{n:05d}-of-{len(ranges):05d}" for n in range(len(ranges))]
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(folder, f".{spec.name}{LOCK}"))
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}; choose a folder that can be written") from None
        pending = [(*chunk, shard) for chunk, shard in zip(ranges, shards, strict=True) if not shard.exists()]
        write_range = functools.partial(_write_range, source, spec.media_resolver)
        errors = parallel_map(write_range, pending, len(source), workers, on_progress)
    return shards, sum(stop - start for start, stop, _ in pending), list(itertools.chain(*errors))


def _write_range(
    source: RecordSource, media: MediaResolver, start: int, stop: int, shard: pathlib.Path
) -> list[SampleError]:
    from array_record.python import array_record_module

    def write_record(record: Record) -> None:
        writer.write(array_records.encode(_with_bytes(record.fields, media)))

    partial = shard.with_name(f"{shard.name}.{os.getpid()}.partial")
    with translate_full_disk(shard):
        writer = array_record_module.ArrayRecordWriter(os.fspath(partial), _OPTIONS)
        results = [map_record(source[number], write_record) for number in range(start, stop)]
        writer.close()
        rename(partial, shard)
    return [error for error in results if error is not None]


def _with_bytes(fields: Mapping[str, Any], media: MediaResolver) -> dict[str, Any]:
    """Returns the record with the content of its media instead of their names."""
    filled = official(fields)
    for kind in TAG_OF:
        if kind in filled:
            filled[kind] = [_embedded(value, kind, media) for value in filled[kind]]
    return filled


def _embedded(value: Any, kind: str, media: MediaResolver) -> dict[str, Any]:
    name = value.get("path") or kind if isinstance(value, Mapping) else value if isinstance(value, str) else kind
    content = media.resolve(value, kind)
    if isinstance(content, str) and os.path.isdir(content):
        raise BadSampleError(BAD_RECORD, f"{content} is a folder of frames; convert it to a video file", content)
    if isinstance(content, str):
        content = pathlib.Path(content).read_bytes()
    elif isinstance(content, MediaBytes):
        content = content.data
    if not isinstance(content, bytes):
        raise BadSampleError(BAD_RECORD, f"{kind} {name} is not a file; only encoded media can be written")
    options = {key: value[key] for key in VIDEO_OPTIONS if key in value} if isinstance(value, Mapping) else {}
    return {"path": name, "bytes": content, **options}
