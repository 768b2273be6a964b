"""Checks every record and media file of a data set and lists all samples that training would skip."""

from collections.abc import Callable

from data_pipelines.annotations import to_conversation
from data_pipelines.media_resolver import MediaResolver
from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.parallel_map import chunk_ranges, parallel_map
from data_pipelines.sample_errors import UNREADABLE, BadSampleError, SampleError, from_exception
from data_pipelines.sources import RecordSource
from vl3_jax.processing import images, messages, videos
from vl3_jax.processing.video_reader import FrameSamplingOptions, PlanChangedError, VideoReader

CHUNK = 64  # samples per work item


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
    done, errors_by_start = 0, {}
    for (start, stop), errors in parallel_map(
        _check_range, (source, MediaResolver(spec.media), decode), chunk_ranges(len(source), CHUNK), workers
    ):
        errors_by_start[start] = errors
        done += stop - start
        on_progress(done, len(source))
    return len(source), [error for start in sorted(errors_by_start) for error in errors_by_start[start]]


def _check_range(source: RecordSource, media: MediaResolver, decode: bool, start: int, stop: int) -> list[SampleError]:
    results = [_check_sample(source, number, media, decode) for number in range(start, stop)]
    return [error for error in results if error is not None]


def _check_sample(source: RecordSource, number: int, media: MediaResolver, decode: bool) -> SampleError | None:
    record = source[number]
    if isinstance(record, SampleError):
        return record
    conversation = to_conversation(record.fields, record.where, media)
    if isinstance(conversation, SampleError):
        return conversation
    try:
        for turn in messages.parse_messages(conversation.messages):
            for medium in turn.media:
                _check_medium(medium, decode)
    except Exception as error:  # a damaged file may raise anything; it is an error of this sample only
        return from_exception(error, record.where)
    return None


def _check_medium(medium: messages.MediaPart, decode: bool) -> None:
    if medium.kind == "image":
        image = images.open_image(medium.source)
        if decode:
            image.load()
        return
    video = _open_video(medium)
    try:
        for _ in video.frames() if decode else ():
            pass
    except PlanChangedError:
        pass  # the damage is reported in `video.warnings`
    if video.warnings:
        raise BadSampleError(UNREADABLE, video.warnings[-1], video.name)


def _open_video(medium: messages.MediaPart) -> VideoReader:
    options = dict(medium.options)
    timestamps = options.pop("timestamps", None)
    if isinstance(medium.source, list):
        return videos.open_video(medium.source, None, timestamps)
    return videos.open_video(medium.source, FrameSamplingOptions(**{"threads": 1, **options}), timestamps)
