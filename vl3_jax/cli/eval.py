"""`vl3 eval`: asks benchmarks, and scores the answers."""

import argparse
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vl3_jax.cli import eval_offline, generation_flags, process_flags, settings_flags
from vl3_jax.config_tree import Limits
from vl3_jax.errors import InputError
from vl3_jax.evaluation import answer_file, benchmarks
from vl3_jax.evaluation.benchmark import Item
from vl3_jax.evaluation.benchmarks.synthetic import FAMILY, QuestionSelection
from vl3_jax.evaluation.prompts import Question, media_groups, questions_of, swap_media
from vl3_jax.evaluation.protocol import DECODING, IMAGE_MERGE, PAPER, EvalProtocol
from vl3_jax.inference.answer_settings import PROCESSOR
from vl3_jax.storage.shards import Shard

logger = logging.getLogger(__name__)

EPILOG = """examples:
  vl3 eval --model nano --tasks nano --out RUNS/eval
  vl3 eval --model RUNS/nano4 --tasks nano/digit,nano/box --count 500 --out RUNS/eval
  vl3 eval --model nano --tasks nano --blind --out RUNS/blind      each question with the media of another one
  vl3 eval --model DAMO-NLP-SG/VideoLLaMA3-2B --tasks videomme,charades_sta --data BENCHMARKS --out RUNS/videos
  vl3 eval ... --shard 2/4                                           this process asks the second of four parts
  vl3 eval --score-only RUNS/eval/answers.jsonl
  vl3 eval --check-data --data BENCHMARKS --tasks videomme,MME
  vl3 eval --score-only answers.jsonl --data BENCHMARKS --out RUNS/scores       answers to benchmarks of the paper
  vl3 eval --vectors FILE.jsonl --official-scoring                   responses with the scores they must get

DIR gets a line for each answer as soon as there is one, and then results.json, results.md, results.html, samples.jsonl
and worst.html. After an interruption the same command resumes: answered questions are not asked again. "constant
answer" is the score of the best one, "kept" the share of vision tokens left by pruning.

exit codes: 0 done, 2 bad input or missing samples (one line on stderr says which), 1 internal error, or vectors that do
not reproduce"""


_SELECTION = {name: f"--{name}" for name in ("count", "seed", "split", "images")}
# Questions that are answered side by side: those of nano are short, a prompt of a benchmark has up to 16,384 tokens.
_SMALL_BATCH, _LARGE_BATCH = 8, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    generation_flags.add_model(parser, required=False)
    generation_flags.add_adapter(parser)
    questions = parser.add_argument_group("questions")
    groups = f"{FAMILY}: the synthetic tasks; images, videos, paper, masks: benchmarks; or their names, or FILE.py"
    questions.add_argument("--tasks", metavar="A,B", help=groups)
    settings_flags.add(questions, QuestionSelection, _SELECTION)
    questions.add_argument("--blind", action="store_true", help="give each question the media of another one")
    protocol = parser.add_argument_group("protocol (by default the paper's)")
    generation_flags.add_processing(protocol, f"{IMAGE_MERGE} for image benchmarks, else the checkpoint's")
    generation_flags.add_sampling(protocol, DECODING, {"max_new_tokens": str(PAPER["max_new_tokens"])})
    protocol.add_argument("--system", metavar="TEXT", help="a system prompt")
    generation_flags.add_tracking(protocol)
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch",
        type=settings_flags.number(int, Limits(1, 4096)),
        metavar="N",
        help=f"questions that are answered side by side (default: {_LARGE_BATCH} for {FAMILY}, else {_SMALL_BATCH})",
    )
    speed.add_argument(
        "--threads",
        type=settings_flags.number(int, Limits(1, 1024)),
        metavar="N",
        help="threads that decode media ahead (default: one for each core, on a CPU for every second one)",
    )
    speed.add_argument("--shard", metavar="I/N", help="ask part I of N; the last one to finish scores all")
    process_flags.add(parser)
    eval_offline.add_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", help="folder for answers and scores")
    output.add_argument(
        "--score-only", metavar="FILE", help="score the answers of a file, or of a run's folder, without a model"
    )


def run(arguments: argparse.Namespace) -> int | None:
    """Asks the questions, scores the answers, prints the tables and writes the results."""
    if arguments.vectors:
        return eval_offline.run_vectors(arguments)
    if arguments.check_data:
        return eval_offline.run_check_data(arguments)
    if arguments.score_only:
        return eval_offline.run_score_only(arguments)
    with generation_flags.naming_flags():
        return _ask_and_score(arguments)


def _ask_and_score(arguments: argparse.Namespace) -> None:
    """Asks the questions of this process that have no answer, and scores all once they are answered."""
    for name in ("model", "tasks", "out"):
        if not getattr(arguments, name):
            raise InputError(f"give --{name}, or --score-only with a file of answers")
    protocol = EvalProtocol(arguments.system, **generation_flags.given(arguments, (*PROCESSOR, *DECODING)))
    selection = QuestionSelection(**settings_flags.given(arguments, QuestionSelection))
    found = benchmarks.find(benchmarks.listed(arguments.tasks), selection)
    tracking = _tracking(arguments, found)
    items = _items(arguments, found)
    settings = _settings(arguments, protocol, selection) | tracking
    identity = {name: value for name, value in settings.items() if name != "model"}
    asked = [benchmark for benchmark in found if benchmark.task in items]
    questions = [
        question for benchmark in asked for question in questions_of(benchmark, items[benchmark.task], identity)
    ]
    shard = _shard(arguments)
    answers = _answers(arguments, protocol, settings, questions, shard)
    failed = [question for question in questions if not answer_file.is_valid(answers.get(question.id))]
    if len(answers) < len(questions):
        print(f"shard {shard.number}/{shard.count} is done; {len(answers)} of {len(questions)} questions are asked")
        failed = [question for question in failed if question.id in answers]
    elif arguments.shard or shard.number == 1:
        records = [dict(answers[question.id]) for question in questions]
        eval_offline.score(arguments, records, pathlib.Path(arguments.out), items, settings)
    if failed:
        raise InputError(f"{len(failed)} samples have no valid answer, as {failed[0].id}; {arguments.out} says why")


def _answers(
    arguments: argparse.Namespace,
    protocol: EvalProtocol,
    settings: Mapping[str, Any],
    questions: Sequence[Question],
    shard: Shard,
) -> Mapping[str, Mapping[str, Any]]:
    """Asks the questions of a shard that have no valid answer, and returns the answers to all questions by id."""
    from vl3_jax.parallel import processes

    hashes = {question.id: question.hash for question in questions}
    own = [question for group in shard.of(media_groups(questions)) for question in group]
    with processes.ended_together(), answer_file.open_answers(arguments.out, settings, shard) as journal:
        before = answer_file.answered(answer_file.read(arguments.out), hashes)
        pending = [question for question in own if not answer_file.is_valid(before.get(question.id))]
        _ask(arguments, protocol, pending, len(own), journal.append)
        answers = answer_file.answered(answer_file.read(arguments.out), hashes)
        if arguments.shard:
            return answers
        mine = processes.gathered([dict(answers[question.id]) for question in own])
        return answer_file.answered([*answers.values(), *mine], hashes)


def _ask(
    arguments: argparse.Namespace,
    protocol: EvalProtocol,
    pending: Sequence[Question],
    total: int,
    append: Callable[[dict[str, Any]], None],
) -> None:
    """Asks questions and appends their answers; the model is loaded only if there are any."""
    from tqdm import tqdm

    if not pending:
        logger.info("0 answers in 0 s: all questions are answered")
        return
    from vl3_jax.evaluation.runner import Runner
    from vl3_jax.inference.buckets import power_of_two

    model = generation_flags.load_model(arguments)
    small = all(question.benchmark.kind == "synthetic" for question in pending)
    batch_size = min(arguments.batch or (_LARGE_BATCH if small else _SMALL_BATCH), power_of_two(len(pending)))
    runner = Runner(model, protocol, batch_size, arguments.threads)
    interval = 0.5 if sys.stderr.isatty() else 10.0
    started = time.perf_counter()
    with tqdm(total=total, initial=total - len(pending), unit=" answers", file=sys.stderr, mininterval=interval) as bar:
        for record in runner.ask(pending):
            append(record)
            bar.set_description(record["task"], refresh=False)
            bar.update()
    seconds = time.perf_counter() - started
    logger.info("%d answers in %.0f s, %.1f a second", len(pending), seconds, len(pending) / max(seconds, 1e-9))


def _tracking(arguments: argparse.Namespace, found: Sequence[benchmarks.Benchmark]) -> dict[str, Any]:
    """Returns the flags of how objects are tracked that are given, once the benchmarks know them."""
    given = {name: getattr(arguments, name) for name in ("mode", "key_frames")}
    given = {name: value for name, value in given.items() if value is not None}
    tracked = [benchmark for benchmark in found if benchmark.draws and benchmark.kind == "video"]
    if given and not tracked:
        raise InputError("--mode and --key-frames are of benchmarks that track objects in videos; leave them out")
    for benchmark in tracked:
        vars(benchmark).update(given)
    return given


def _items(arguments: argparse.Namespace, found: Sequence[benchmarks.Benchmark]) -> dict[str, list[Item]]:
    """Returns the items of each task to ask; a blind check leaves out tasks without media."""
    items = {benchmark.task: benchmark.load(arguments.data) for benchmark in found}
    for task, questions in items.items():
        if not questions:
            raise InputError(f"{task}: its data holds no questions; `vl3 eval --check-data` says what is missing")
    if arguments.blind:
        with_media = [benchmark for benchmark in found if any(item.media for item in items[benchmark.task])]
        if not with_media:
            raise InputError("a blind check needs tasks with media; these have none")
        items = {benchmark.task: swap_media(benchmark, items[benchmark.task]) for benchmark in with_media}
    return items


def _settings(arguments: argparse.Namespace, protocol: EvalProtocol, selection: QuestionSelection) -> dict[str, Any]:
    """Returns what the answers depend on: the model and the protocol, as the result records them."""
    from vl3_jax.checkpoint import open_source
    from vl3_jax.inference.generation_config import GenerationConfig
    from vl3_jax.processing.processor_config import ProcessorConfig

    files = open_source(arguments.model, token=arguments.token).files
    settings = {"model": arguments.model, "blind": arguments.blind} | generation_flags.model_identity(arguments)
    penalty = GenerationConfig.read(files, ()).repetition_penalty
    settings |= protocol.record(ProcessorConfig.from_folder(files), penalty)
    return settings | {name: getattr(selection, name) for name in ("seed", "split", "images")}


def _shard(arguments: argparse.Namespace) -> Shard:
    """Returns the part of the questions that this process asks: that of --shard, or of a process of a job."""
    if arguments.shard:
        return Shard.parse(arguments.shard)
    import jax

    process_flags.connect(arguments)
    return Shard(jax.process_index() + 1, jax.process_count())
