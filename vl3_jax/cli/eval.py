"""`vl3 eval`: asks questions with known answers in batches, and scores the answers."""

import argparse
import logging
import pathlib
import sys
import time

from vl3_jax.cli import eval_offline, generation_flags, settings_flags
from vl3_jax.errors import InputError
from vl3_jax.evaluation.tasks import QuestionSelection

logger = logging.getLogger(__name__)

EPILOG = """examples:
  vl3 eval --model nano --tasks nano --out RUNS/eval
  vl3 eval --model RUNS/nano4 --tasks nano/digit,nano/box --count 500 --out RUNS/eval
  vl3 eval --model nano --tasks nano --blind --out RUNS/blind      each question with the media of another one
  vl3 eval --score-only RUNS/eval/answers.jsonl
  vl3 eval --check-data --data BENCHMARKS --tasks videomme,MME
  vl3 eval --score-only answers.jsonl --data BENCHMARKS --out RUNS/scores       answers to benchmarks of the paper
  vl3 eval --vectors FILE.jsonl --official-scoring                   responses with the scores they must get

DIR gets answers.jsonl, one line per answer, written batch by batch, and scores.json. After an interruption the same
command resumes: answered questions are not asked again. "majority" is the score of the best constant answer, "kept" the
share of vision tokens left by pruning.

exit codes: 0 done, 2 bad input or missing samples (one line on stderr says which), 1 internal error, or vectors that do
not reproduce"""


_SELECTION = {name: f"--{name}" for name in ("count", "seed", "split", "images")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    generation_flags.add_model(parser, required=False)
    questions = parser.add_argument_group("questions")
    questions.add_argument("--tasks", metavar="A,B", help="nano: all synthetic tasks; nano/digit: one of them")
    settings_flags.add(questions, QuestionSelection, _SELECTION)
    questions.add_argument("--blind", action="store_true", help="give each question the media of another one")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--no-prune", action="store_true", help="keep every video token")
    generation.add_argument("--batch", type=int, metavar="N", help="questions per batch (default: as --count needs)")
    eval_offline.add_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", help="folder for answers and scores")
    output.add_argument(
        "--score-only", metavar="FILE", help="score the answers.jsonl of an earlier run, without a model"
    )


def run(arguments: argparse.Namespace) -> int | None:
    """Asks the questions, scores the answers, prints the tables and writes the results."""
    if arguments.vectors:
        return eval_offline.run_vectors(arguments)
    if arguments.check_data:
        return eval_offline.run_check_data(arguments)
    if arguments.score_only:
        _score_only(arguments)
    else:
        _print_scores(_answers(arguments), arguments.out)
    return None


def _score_only(arguments: argparse.Namespace) -> None:
    """Scores the answers of a file: those to synthetic tasks, and those to benchmarks."""
    from vl3_jax.evaluation import answer_file
    from vl3_jax.evaluation.tasks import FAMILY

    if arguments.model:
        raise InputError("--score-only takes no --model; leave it out")
    if arguments.tasks and not arguments.data:
        raise InputError("--score-only takes --tasks only with --data; leave it out")
    records = answer_file.read(arguments.score_only, ("id", "task", "answer"))
    folder = pathlib.Path(arguments.out or pathlib.Path(arguments.score_only).parent)
    synthetic = [record for record in records if record["task"].startswith(f"{FAMILY}/")]
    others = [record for record in records if not record["task"].startswith(f"{FAMILY}/")]
    if synthetic:
        _print_scores(synthetic, folder)
    if others or not synthetic:
        eval_offline.score_benchmarks(arguments, others, folder)


def _print_scores(records: list[dict], folder: str | pathlib.Path) -> None:
    from vl3_jax.evaluation import scores

    results = scores.score(records)
    print(scores.table(results))
    scores.save(results, folder)


def _answers(arguments: argparse.Namespace) -> list[dict]:
    """Asks the questions without an answer, and returns all answers of the run."""
    from tqdm import tqdm

    from vl3_jax.checkpoint import open_source
    from vl3_jax.evaluation import answer_file, batch_generator, runner, tasks
    from vl3_jax.inference.buckets import power_of_two
    from vl3_jax.inference.open_model import load

    for name in ("model", "tasks", "out"):
        if not getattr(arguments, name):
            raise InputError(f"give --{name}, or --score-only with a file of answers")
    if arguments.batch is not None and arguments.batch < 1:
        raise InputError(f"--batch {arguments.batch}: give 1 or more")
    selection = QuestionSelection(**settings_flags.given(arguments, QuestionSelection))
    selected_tasks = tasks.find(name.strip() for name in arguments.tasks.split(","))
    task_questions = runner.questions_of(selected_tasks, selection, arguments.blind)
    settings = {name: getattr(arguments, name) for name in ("model", "dtype", "quantize", *vars(selection))}
    settings |= {"prune": not arguments.no_prune, "blind": arguments.blind}
    settings["checkpoint"] = open_source(arguments.model, token=arguments.token).fingerprint()
    with answer_file.open_answers(arguments.out, settings) as journal:
        chat_model = load(arguments.model, dtype=arguments.dtype, quantize=arguments.quantize, token=arguments.token)
        batch_size = min(arguments.batch or batch_generator.BATCH_SIZE, power_of_two(selection.count))
        generator = batch_generator.BatchGenerator(chat_model, batch_size, prune=not arguments.no_prune)
        started = time.perf_counter()
        interval = 0.5 if sys.stderr.isatty() else 10.0
        total = sum(len(questions) for _, questions in task_questions)
        with tqdm(total=total, unit=" answers", file=sys.stderr, mininterval=interval) as bar:

            def update_bar(task: str, done: int) -> None:
                bar.set_description(task, refresh=False)
                bar.update(done)

            new = runner.ask(generator, task_questions, journal, update_bar)
        seconds = time.perf_counter() - started
        logger.info("%d answers in %.0f s, %.1f a second", len(new), seconds, len(new) / max(seconds, 1e-9))
    names = {task.name for task, _ in task_questions}
    answers = {record["id"]: record for record in [*journal.entries, *new] if record["task"] in names}
    return list(answers.values())
