"""Checks every record and media file of a data set and lists all samples that training would skip."""

import contextlib
import functools
import itertools
from collections.abc import Callable

from data_pipelines.annotations import parse_conversation
from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.parallel_map import chunk_ranges, parallel_map
from data_pipelines.sample_errors import UNREADABLE, BadSampleError, SampleError
from data_pipelines.sources import Record, RecordSource, map_record
from data_pipelines.sources.media_resolver import MediaResolver
from vl3_jax.processing.images import ImageReader
from vl3_jax.processing.processor import MediaReader, open_media
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.video_reader import PlanChangedError

CHUNK = 64  # samples per work item
_PROCESSOR = ProcessorConfig(threads=1)


def check(
    spec: DatasetSpec,
    decode: bool = True,
    workers: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, list[SampleError]]:
    """Checks all samples of a data set.

    Args:
      spec: The data set.
      decode: Decode all images and all sampled video frames; otherwise only headers and packets are read.
      workers: Number of worker processes; 0 checks in this process.
      on_progress: Called with the number of samples checked and the total.

    Returns:
      The number of samples, and the errors of the bad ones in order of the samples.

    Raises:
      InputError: The annotation file cannot be opened.
      WorkerDiedError: A worker process died.
    """
    source = spec.open()
    check_range = functools.partial(_check_range, source, MediaResolver(spec.media), decode)
    ranges = chunk_ranges(len(source), CHUNK)
    errors = parallel_map(check_range, ranges, len(source), workers, on_progress)
    return len(source), list(itertools.chain(*errors))


def _check_range(source: RecordSource, media: MediaResolver, decode: bool, start: int, stop: int) -> list[SampleError]:
    def check_record(record: Record) -> None:
        for turn in parse_conversation(record.fields, media).turns:
            for part in turn.media:
                _check_media(open_media(part, _PROCESSOR), decode)

    results = [map_record(source[number], check_record) for number in range(start, stop)]
    return [error for error in results if error is not None]


def _check_media(reader: MediaReader, decode: bool) -> None:
    if isinstance(reader, ImageReader):
        if decode:
            reader.load()
        return
    with contextlib.suppress(PlanChangedError):  # the damage is reported in `reader.warnings`
        for _ in reader.frames() if decode else ():
            pass
    damage = [warning for warning in reader.warnings if "damaged" in warning]
    if damage:
        raise BadSampleError(UNREADABLE, damage[-1], reader.name)
