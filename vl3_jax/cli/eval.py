"""`vl3 eval`: questions with known answers, asked in batches and scored."""

import argparse
import pathlib
import sys
import time

from data_pipelines.synthetic.image_pool import SPLITS
from vl3_jax.cli import generation_flags
from vl3_jax.errors import InputError

EPILOG = """examples:
  vl3 eval --model nano --tasks nano --out RUNS/eval
  vl3 eval --model RUNS/nano4 --tasks nano/digit,nano/box --count 500 --out RUNS/eval
  vl3 eval --model nano --tasks nano --blind --out RUNS/blind      each question with another one's pictures
  vl3 eval --score-only RUNS/eval/answers.jsonl

DIR gets answers.jsonl, a line for each answer as it comes, and scores.json. Stopped or killed, the same command goes
on: what is answered is not asked again. "majority" is what the best constant answer would score, "kept" the share of
vision tokens that pruning left.

exit codes: 0 done, 2 bad input (one line on stderr says which), 1 a failure of ours"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.epilog = EPILOG
    generation_flags.add_model(parser, required=False)
    asked = parser.add_argument_group("questions")
    asked.add_argument("--tasks", metavar="A,B", help="nano: all of the synthetic tasks; nano/digit: one of them")
    asked.add_argument("--count", type=int, default=200, metavar="N", help="questions of each task (default: 200)")
    asked.add_argument("--seed", type=int, default=7, help="of the questions (default: 7)")
    asked.add_argument("--split", choices=SPLITS, default="test", help="whose pictures are shown (default: test)")
    asked.add_argument("--pictures", metavar="NPZ", help="show these instead of the split's own")
    asked.add_argument("--blind", action="store_true", help="show each question the media of another one")
    answered = parser.add_argument_group("answering")
    answered.add_argument("--no-prune", action="store_true", help="keep every video token")
    answered.add_argument("--batch", type=int, metavar="N", help="questions answered side by side (default: 32)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", help="where answers and scores go")
    output.add_argument("--score-only", metavar="FILE", help="score the answers.jsonl of an earlier run, no model")


def run(arguments: argparse.Namespace) -> None:
    """Asks, scores and prints the table."""
    from vl3_jax.evaluation import answer_file, scores

    if arguments.score_only:
        if arguments.model or arguments.tasks:
            raise InputError("--score-only has its answers already; leave --model and --tasks out")
        found = scores.score(answer_file.read(arguments.score_only))
        folder = arguments.out or pathlib.Path(arguments.score_only).parent
    else:
        found = scores.score(_answers(arguments))
        folder = arguments.out
    print(scores.table(found))
    scores.save(found, folder)


def _answers(arguments: argparse.Namespace) -> list[dict]:
    """All answers of the run that this command belongs to; those that are missing are asked for."""
    from tqdm import tqdm

    from vl3_jax.checkpoint import open_source
    from vl3_jax.evaluation import answer_file, batch_generator, runner, tasks
    from vl3_jax.inference.buckets import power_of_two
    from vl3_jax.inference.chat_model import load

    for name in ("model", "tasks", "out"):
        if not getattr(arguments, name):
            raise InputError(f"give --{name}, or --score-only with a file of answers")
    if arguments.batch is not None and arguments.batch < 1:
        raise InputError(f"--batch {arguments.batch}: give 1 or more")
    selection = tasks.QuestionSelection(arguments.count, arguments.seed, arguments.split, arguments.images)
    chosen = tasks.find(name.strip() for name in arguments.tasks.split(","))
    asked = runner.questions_of(chosen, selection, arguments.blind)
    settings = {name: getattr(arguments, name) for name in ("model", "dtype", "quantize", *vars(selection))}
    settings |= {"prune": not arguments.no_prune, "blind": arguments.blind}
    settings["checkpoint"] = open_source(arguments.model, token=arguments.token).fingerprint()
    wanted = {task.name for task, _ in asked}
    with answer_file.AnswerFile(arguments.out, settings) as answers:
        assistant = load(arguments.model, dtype=arguments.dtype, quantize=arguments.quantize, token=arguments.token)
        batch = min(arguments.batch or batch_generator.BATCH, power_of_two(selection.count))
        answerer = batch_generator.BatchGenerator(assistant, batch, prune=not arguments.no_prune)
        started = time.perf_counter()
        interval = 0.5 if sys.stderr.isatty() else 10.0
        total = sum(len(questions) for _, questions in asked)
        with tqdm(total=total, unit=" answers", file=sys.stderr, mininterval=interval) as bar:

            def show(task: str, done: int) -> None:
                bar.set_description(task, refresh=False)
                bar.update(done)

            new = runner.ask(answerer, asked, answers, show)
        seconds = time.perf_counter() - started
        generation_flags.say(f"{new} answers in {seconds:.0f} s, {new / max(seconds, 1e-9):.1f} a second")
        return [record for record in answers.records.values() if record["task"] in wanted]
