"""`vl3 batch`: answers a file of requests."""

import argparse
import functools
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from vl3_jax.batch import ROWS
from vl3_jax.cli import generation_flags, settings_flags
from vl3_jax.config_tree import Limits
from vl3_jax.errors import InputError, printable
from vl3_jax.inference.answer_settings import ALLOW_REMOTE
from vl3_jax.storage.shards import Shard

logger = logging.getLogger(__name__)

EPILOG = """examples:
  vl3 batch --model DIR --in requests.jsonl --out answers.jsonl
  vl3 batch --model DIR --in requests.jsonl --out answers.jsonl --retry       asks again what has failed
  vl3 batch --model DIR --in requests.jsonl --out answers.jsonl --shard 2/4   this process answers part 2 of 4
  vl3 batch --model DIR --adapter legal=RUNS/legal --in ... --out ...         {"body": {"adapter": "legal", ...}}

A request is a line in the form of OpenAI's batch files:
  {"custom_id": "a", "body": {"messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "cat.jpg"}}, {"type": "text", "text": "What?"}]}], "max_tokens": 50}}
An answer is a line {"id", "custom_id", "response": {"status_code", "body"}, "error"}, written as soon as there is one.
After an interruption the same command resumes, with any number of shards: nothing is asked twice. Flags of decoding and
media are the defaults of requests that do not set them.

exit codes: 0 every request is answered or its failure recorded (a line on stderr counts them), 2 bad input (one line on
stderr names it), 1 a failure of ours"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    generation_flags.add_model(parser)
    generation_flags.add_adapters(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--in", dest="requests", required=True, metavar="FILE", help="the requests, one a line")
    files.add_argument("--out", required=True, metavar="FILE", help="the answers, one a line, appended to")
    files.add_argument("--retry", action="store_true", help="ask again what has failed before")
    files.add_argument("--shard", metavar="I/N", help="answer part I of N; the last one to finish merges all")
    generation_flags.add_media(parser)
    generation_flags.add_decoding(parser)
    generation_flags.add_constraint(parser)
    speed = parser.add_argument_group("speed")
    for name, text in (
        ("--batch", f"requests that are answered side by side (default: {ROWS})"),
        ("--threads", "threads that decode media ahead (default: one for each core, on a CPU for every second one)"),
    ):
        speed.add_argument(name, type=settings_flags.number(int, Limits(1, 4096)), metavar="N", help=text)


def run(arguments: argparse.Namespace) -> None:
    """Answers the requests that have no answer yet, and merges the answers when all have one."""
    from vl3_jax.batch.answer_parts import AnswerParts
    from vl3_jax.batch.request_file import RequestFile

    shard = Shard.parse(arguments.shard) if arguments.shard else Shard()
    settings = generation_flags.settings(arguments)
    requests = RequestFile(generation_flags.file_argument(arguments.requests))
    out = generation_flags.file_argument(arguments.out)
    parts = AnswerParts(out, requests.keys, requests.used)
    if parts.path.exists() and requests.path.exists() and parts.path.samefile(requests.path):
        raise InputError(f"{out}: is the file of requests too; give another --out")
    if not requests.used.any():
        raise InputError(f"{requests.path}: holds no requests; give one a line")
    with parts.open(shard, _identity(arguments, settings)) as (log, states):
        _answer(arguments, requests, states, shard, settings, log.append)
    whole = parts.merge()
    _report(parts.states()[requests.used], whole, shard, out)


def _answer(arguments: argparse.Namespace, requests, states, shard: Shard, settings: dict[str, Any], append) -> None:
    """Answers the requests of a shard that have no answer yet; the model is loaded only if there are any."""
    from tqdm import tqdm

    from vl3_jax.batch.answer_parts import ANSWERED, PENDING

    own = requests.lines_of(shard)
    is_done = states[own] == ANSWERED if arguments.retry else states[own] > PENDING
    pending = own[~is_done]
    if not len(pending):
        return
    from vl3_jax.batch.answering import BatchAnswerer

    model = generation_flags.load_model(arguments)
    model.processor.on_frame = lambda name, done, total: None  # the bar stays on its line
    with generation_flags.naming_flags():
        model.resolve(**settings)
    rows = min(arguments.batch or ROWS, len(pending))
    answerer = BatchAnswerer(model, settings, arguments.model, rows, arguments.threads)
    reads = (functools.partial(requests.read, index) for index in pending)
    interval = 0.5 if sys.stderr.isatty() else 10.0
    failed, started = 0, time.perf_counter()
    bar = tqdm(total=len(own), initial=len(own) - len(pending), unit=" answers", file=sys.stderr, mininterval=interval)
    with bar:
        for record in answerer.answer(reads):
            append(record)
            failed += record["error"] is not None
            if failed:
                bar.set_postfix_str(f"{failed} failed", refresh=False)
            bar.update()
    seconds = max(time.perf_counter() - started, 1e-9)
    logger.info(
        "%d answers in %.0f s, %.1f a second; the device waited for media %.0f%% of the time",
        *(len(pending), seconds, len(pending) / seconds, 100 * answerer.seconds_waited / seconds),
    )
    if answerer.other_name is not None:
        name = printable(answerer.other_name)
        logger.warning("warning: requests name the model %s; all were answered by %s", name, arguments.model)


def _report(states: Sequence[int], whole: bool, shard: Shard, out: str) -> None:
    from vl3_jax.batch.answer_parts import counts

    pending, failed, answered = counts(states)
    line = f"{len(states):,} requests: {answered:,} answered, {failed:,} failed"
    if pending:
        line += f", {pending:,} to be answered by other shards than {shard.number}/{shard.count}"
    elif not whole:
        line += "; the process that ends last merges the answers"
    elif failed:
        line += f"; {out} says why, and --retry asks them again"
    logger.info("vl3 batch: %s", line)


def _identity(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns what the answers depend on besides the requests."""
    chosen = {name: value for name, value in settings.items() if name != ALLOW_REMOTE}
    identity = generation_flags.model_identity(arguments) | {"defaults": chosen}
    return json.loads(json.dumps(identity))  # as it is when it is read again
