"""Annotations and media into ArrayRecord shards: one file to read, any order, no small files."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines.media_resolver import MediaResolver
from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.parallel_map import chunk_ranges, parallel_map
from data_pipelines.sample_errors import BAD_RECORD, BadSampleError, SampleError, from_exception
from data_pipelines.sources import RecordSource, array_records
from vl3_jax.errors import InputError

_OPTIONS = "group_size:1"  # each record by itself, else reading one reads its neighbours


def write(
    spec: DatasetSpec,
    folder: str | os.PathLike,
    samples_per_shard: int = 4096,
    workers: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[pathlib.Path], int, list[SampleError]]:
    """Writes `<name>.array_record-00000-of-00010`, ...; whole shards that are there already stay.

    Args:
      entry: the data set.
      folder: where shards go.
      samples_per_shard: fewer for long videos, so that a shard stays below a few GB.
      workers: processes.
      on_progress: told how many samples are done, of how many.

    Returns:
      The shards, the samples gone through now, and those of them left out, with why.

    Raises:
      InputError: nothing to write, or the folder cannot be written.
      WorkerDiedError: whole shards stay.
    """
    source = spec.open()
    spans = chunk_ranges(len(source), samples_per_shard)
    if not spans:
        raise InputError(f"{spec.annotations[0]}: no samples to write")
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; choose a folder that can be written") from None
    shards = [folder / f"{spec.name}.array_record-{n:05d}-of-{len(spans):05d}" for n in range(len(spans))]
    undone = [(*span, shard) for span, shard in zip(spans, shards, strict=True) if not shard.exists()]
    now = sum(stop - start for start, stop, _ in undone)
    done = len(source) - now
    on_progress(done, len(source))
    found = {}
    for (start, stop, _), problems in parallel_map(_write_span, (source, MediaResolver(spec.media)), undone, workers):
        found[start] = problems
        done += stop - start
        on_progress(done, len(source))
    return shards, now, [problem for start in sorted(found) for problem in found[start]]


def _write_span(
    source: RecordSource, media: MediaResolver, start: int, stop: int, shard: pathlib.Path
) -> list[SampleError]:
    from array_record.python import array_record_module

    problems = []
    partial = shard.with_name(f"{shard.name}.{os.getpid()}.partial")
    writer = array_record_module.ArrayRecordWriter(os.fspath(partial), _OPTIONS)
    for number in range(start, stop):
        record = source[number]
        if isinstance(record, SampleError):
            problems.append(record)
            continue
        try:
            writer.write(array_records.encode(_with_bytes(record.fields, media)))
        except Exception as error:  # whatever one sample provokes is its problem
            problems.append(from_exception(error, record.where))
    writer.close()
    os.replace(partial, shard)
    return problems


def _with_bytes(fields: Mapping[str, Any], media: MediaResolver) -> dict[str, Any]:
    """The record with the content of its media in place of their names."""
    if not isinstance(fields, Mapping):
        raise BadSampleError(BAD_RECORD, f"a {type(fields).__name__}; each record is an object {{...}}")
    filled = dict(fields)
    for kind in array_records.MEDIA_KEYS:
        values = filled.get(kind) or []
        filled[kind] = [_embedded(value, kind, media) for value in (values if isinstance(values, list) else [values])]
    return filled


def _embedded(value: Any, kind: str, media: MediaResolver) -> dict[str, Any]:
    name = value.get("path") or kind if isinstance(value, Mapping) else value if isinstance(value, str) else kind
    content = media.find(value, kind)
    if isinstance(content, str) and os.path.isdir(content):
        raise BadSampleError(BAD_RECORD, f"{content} is a folder of frames; make a video file of it", content)
    if isinstance(content, str):
        content = pathlib.Path(content).read_bytes()
    if not isinstance(content, bytes):
        raise BadSampleError(BAD_RECORD, f"{kind} {name} is no file; only encoded media can be written")
    return {"path": name, "bytes": content}
