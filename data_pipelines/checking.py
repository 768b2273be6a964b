"""Looks at every record and medium of a data set, to list all that training would skip."""

from collections.abc import Callable
from typing import Any

from data_pipelines.annotations import to_conversation
from data_pipelines.media_resolver import MediaResolver
from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.parallel_map import chunk_ranges, parallel_map
from data_pipelines.sample_errors import UNREADABLE, BadSampleError, SampleError, from_exception
from data_pipelines.sources import RecordSource
from vl3_jax.processing import images, messages, videos
from vl3_jax.processing.video_reader import FrameSamplingOptions, PlanChangedError

CHUNK = 64


def check(
    spec: DatasetSpec,
    decode: bool = True,
    workers: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, list[SampleError]]:
    """Number of samples, and what is wrong with the bad ones, in order.

    Args:
      entry: the data set.
      decode: decode all pictures and the frames that videos show; else their headers and packets are read.
      workers: processes.
      on_progress: told how many samples are done, of how many.

    Raises:
      InputError: the annotation file cannot be opened.
      WorkerDiedError: see there.
    """
    source = spec.open()
    done, found = 0, {}
    for (start, stop), problems in parallel_map(
        _check_span, (source, MediaResolver(spec.media), decode), chunk_ranges(len(source), CHUNK), workers
    ):
        found[start] = problems
        done += stop - start
        on_progress(done, len(source))
    return len(source), [problem for start in sorted(found) for problem in found[start]]


def _check_span(source: RecordSource, media: MediaResolver, decode: bool, start: int, stop: int) -> list[SampleError]:
    found = [_problem(source, number, media, decode) for number in range(start, stop)]
    return [problem for problem in found if problem is not None]


def _problem(source: RecordSource, number: int, media: MediaResolver, decode: bool) -> SampleError | None:
    record = source[number]
    if isinstance(record, SampleError):
        return record
    conversation = to_conversation(record.fields, record.where, media)
    if isinstance(conversation, SampleError):
        return conversation
    try:
        for turn in messages.parse_messages(conversation.messages):
            for medium in turn.media:
                _look_at(medium, decode)
    except Exception as error:  # whatever a damaged file provokes is that sample's problem
        return from_exception(error, record.where)
    return None


def _look_at(medium: messages.MediaPart, decode: bool) -> None:
    if medium.kind == "image":
        image = images.open_image(medium.source)
        if decode:
            image.load()
        return
    clip = _opened(medium)
    try:
        for _ in clip.frames() if decode else ():
            pass
    except PlanChangedError:
        pass  # what it found out is in the notes
    if clip.notes:
        raise BadSampleError(UNREADABLE, clip.notes[-1], clip.name)


def _opened(medium: messages.MediaPart) -> Any:
    options = dict(medium.options)
    timestamps = options.pop("timestamps", None)
    if isinstance(medium.source, list):
        return videos.open_video(medium.source, None, timestamps)
    return videos.open_video(medium.source, FrameSamplingOptions(**{"threads": 1, **options}), timestamps)
