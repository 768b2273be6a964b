#!/usr/bin/env python3
r"""Answers a file of requests with an Apache Beam pipeline: `vl3 batch` on workers of Dataflow, Flink, Spark, or here.

    python launch/beam_batch.py --model nano --in requests.jsonl --out answers.jsonl
    python launch/beam_batch.py --model gs://BUCKET/model --in gs://BUCKET/requests.jsonl \
        --out gs://BUCKET/answers.jsonl --runner DataflowRunner --project PROJECT --region us-central1 \
        --temp_location gs://BUCKET/tmp --sdk_container_image IMAGE --machine_type g2-standard-8 \
        --dataflow_service_options "worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver" [--dry-run]

The answers are those of `vl3 batch`, line by line, in files such as answers-00000-of-00004.jsonl, in any order; Beam
repeats what a lost worker has not finished. The flags of the model, of decoding and media are those of `vl3 batch`, and
all others are Beam's. The image of the workers has Beam's worker, this package and JAX for their devices. --dry-run
builds the pipeline, prints its steps and Beam's settings, and submits nothing.

exit codes: 0 done, 2 bad input
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vl3_jax.batch.answering import ROWS, BatchAnswerer
from vl3_jax.batch.request_file import MOST_BYTES, RequestLine, keys_of, name_of, number_lines, request_line
from vl3_jax.cli import generation_flags
from vl3_jax.errors import InputError

try:
    import apache_beam as beam
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions, TestOptions
    from apache_beam.utils.shared import Shared
except ImportError:
    sys.exit("beam_batch.py: needs Apache Beam: pip install 'vl3_jax[beam]'")

Numbered = tuple[int, bytes]  # number of a line, from 1, and its content
_PER_CALL = 32  # requests for each row of the engine that are given to it together


def read_lines(path: str) -> Iterator[Numbered]:
    """Yields the lines of a file that are not blank."""
    with FileSystems.open(path) as file:
        for number, length, content in number_lines(file):
            if content or length > MOST_BYTES:
                yield number, content


def with_name(line: Numbered) -> tuple[str, Numbered]:
    """Returns a line behind what it shares with all lines of its `custom_id`."""
    number, content = line
    return f"{keys_of(number, content, name_of(content))[0]:016x}", line


def request_lines(named: tuple[str, Iterable[Numbered]]) -> Iterator[RequestLine]:
    """Yields the requests of one `custom_id`, of which the first in the file is asked."""
    (first, content), *others = sorted(named[1])
    yield request_line(first, content)
    for number, content in others:
        yield request_line(number, content, first)


def _itself(line: RequestLine) -> RequestLine:
    return line


class Answer(beam.DoFn):
    """Answers lists of requests with a model that all threads of a worker share."""

    def __init__(self, arguments: argparse.Namespace, settings: dict[str, Any]):
        self._arguments, self._settings, self._shared = arguments, settings, Shared()
        self._model: Any = None

    def setup(self):
        self._model = self._shared.acquire(lambda: generation_flags.load_model(self._arguments))

    def process(self, lines: Sequence[RequestLine]) -> Iterator[str]:
        answerer = BatchAnswerer(self._model, self._settings, self._arguments.model, self._arguments.batch)
        for record in answerer.answer([functools.partial(_itself, line) for line in lines]):
            yield json.dumps(record, ensure_ascii=False)


def build(pipeline: beam.Pipeline, arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Adds the steps from the file of requests to the files of answers."""
    out = pathlib.PurePosixPath(arguments.out)
    prefix = arguments.out.removesuffix(out.suffix)
    most = arguments.batch * _PER_CALL
    _ = (
        pipeline
        | "File" >> beam.Create([arguments.requests])
        | "Lines" >> beam.FlatMap(read_lines)
        | "Names" >> beam.Map(with_name)
        | "Duplicates" >> beam.GroupByKey()
        | "Requests" >> beam.FlatMap(request_lines)
        | "Lists" >> beam.BatchElements(min_batch_size=arguments.batch, max_batch_size=most)
        | "Answers" >> beam.ParDo(Answer(arguments, settings))
        | "Files" >> beam.io.WriteToText(prefix, out.suffix, num_shards=arguments.files)
    )


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags of this script, and those of Beam."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    generation_flags.add_model(parser)
    generation_flags.add_adapters(parser)
    parser.add_argument("--in", dest="requests", required=True, metavar="FILE", help="the requests, one a line")
    parser.add_argument("--out", required=True, metavar="FILE", help="the answers; becomes FILE-00000-of-0000N")
    parser.add_argument("--files", type=int, default=0, metavar="N", help="number of files of answers (Beam's choice)")
    parser.add_argument("--batch", type=int, default=ROWS, metavar="N", help=f"requests side by side ({ROWS})")
    parser.add_argument("--dry-run", action="store_true", help="build and check the pipeline, and submit nothing")
    generation_flags.add_media(parser)
    generation_flags.add_decoding(parser)
    generation_flags.add_constraint(parser)
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the pipeline; returns the exit code."""
    arguments, others = parse(sys.argv[1:] if argv is None else argv)
    try:
        settings = generation_flags.settings(arguments)
        if min(arguments.batch, arguments.files + 1) < 1:
            raise InputError("--batch must be at least 1, --files must not be negative")
        try:
            options = PipelineOptions(others)
            options.view_as(TestOptions).dry_run = arguments.dry_run  # checks no buckets then
            pipeline = beam.Pipeline(options=options)
            build(pipeline, arguments, settings)
        except ValueError as error:  # flags that the runner needs
            raise InputError(error) from None
    except InputError as error:
        print(f"beam_batch.py: {error}", file=sys.stderr)
        return 2
    if arguments.dry_run:
        graph = pipeline.to_runner_api()
        steps = graph.components.transforms[graph.root_transform_ids[0]].subtransforms
        for step in steps:
            print(graph.components.transforms[step].unique_name)
        for name, value in sorted(options.get_all_options(drop_default=True).items()):
            print(f"  {name}: {value}")
        return 0
    pipeline.run().wait_until_finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
