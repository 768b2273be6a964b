"""Checks every record and media file of a data set and lists all samples that training would skip."""

import contextlib
import functools
from collections.abc import Callable

from data_pipelines.annotations import parse_conversation
from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.parallel_map import chunk_ranges, parallel_map
from data_pipelines.record_counts import RecordCounts
from data_pipelines.sample_builder import open_conversation, raise_if_damaged
from data_pipelines.sample_errors import SampleError
from data_pipelines.sources import Record, RecordSource, map_record
from data_pipelines.sources.media_resolver import MediaResolver
from vl3_jax.processing.images import ImageReader
from vl3_jax.processing.processor import MediaReader
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.video_reader import PlanChangedError

CHUNK = 64  # samples per work item


def check(
    spec: DatasetSpec,
    config: ProcessorConfig,
    decode: bool = True,
    workers: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, RecordCounts, list[SampleError]]:
    """Checks all samples of a data set.

    Args:
      spec: The data set.
      config: Settings of frame sampling.
      decode: Decode all images and all sampled video frames; otherwise only headers and packets are read.
      workers: Number of worker processes; 0 checks in this process.
      on_progress: Called with the number of samples checked and the total.

    Returns:
      The number of samples, what was read from the good ones, and the errors of the bad ones in order of the samples.

    Raises:
      InputError: The annotation file cannot be opened.
      WorkerDiedError: A worker process died.
    """
    source = spec.open()
    check_range = functools.partial(_check_range, source, spec.media_resolver, config, decode)
    ranges = chunk_ranges(len(source), CHUNK)
    counts, errors = RecordCounts(), []
    for read, bad in parallel_map(check_range, ranges, len(source), workers, on_progress):
        counts.add([read])
        errors += bad
    return len(source), counts, errors


def _check_range(
    source: RecordSource, media: MediaResolver, config: ProcessorConfig, decode: bool, start: int, stop: int
) -> tuple[RecordCounts, list[SampleError]]:
    def check_record(record: Record) -> RecordCounts:
        conversation = parse_conversation(record.fields, media, config.fps)
        for reader in open_conversation(conversation, config):
            if decode:
                _decode(reader)
        return conversation.counts

    counts, errors = RecordCounts(), []
    for number in range(start, stop):
        result = map_record(source[number], check_record)
        if isinstance(result, SampleError):
            errors.append(result)
        else:
            counts.add([result])
    return counts, errors


def _decode(reader: MediaReader) -> None:
    if isinstance(reader, ImageReader):
        reader.load()
    else:
        with contextlib.suppress(PlanChangedError):  # the damage is reported in `reader.warnings`
            for _ in reader.frames():
                pass
    raise_if_damaged(reader.warnings)
