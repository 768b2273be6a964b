"""`vl3 demo`: six questions about images and videos that the model has never seen, answered on this machine."""

import argparse
import pathlib
import time
from typing import Any

from data_pipelines.synthetic import parsing
from vl3_jax.cli import demo_report
from vl3_jax.errors import InputError

EPILOG = """Images and videos are generated from held-out handwritten digits and clothes; another --seed gives other
ones. The report shows them as the model received them: what the frame pruner removed is dimmed.

exit codes: 0 done, 2 bad input (one line on stderr says which), 1 internal error"""

# Tasks of an even and of an odd seed.
TASKS = (("digit", "ocr", "box", "motion", "when", "static"), ("fashion", "count", "box", "motion", "when", "stream"))
_MIN_SCORE = 0.5  # score from which a box or span counts as right


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--model", metavar="M", help="any checkpoint that `vl3 ask` takes (default: nano)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the questions (default: %(default)s)")
    parser.add_argument("--out", default="demo.html", metavar="FILE", help="the report (default: demo.html)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=48,
        metavar="N",
        help="maximum number of tokens of an answer (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Asks the questions, prints the answers and writes the report."""
    from vl3_jax.checkpoint.load import NANO
    from vl3_jax.evaluation.batch_generator import BatchGenerator
    from vl3_jax.inference.chat_model import load

    report = pathlib.Path(arguments.out)
    if not report.absolute().parent.is_dir():
        raise InputError(f"{report}: there is no folder {report.parent}; create it or choose another --out")
    if arguments.seed < 0:
        raise InputError(f"seed {arguments.seed}: give 0 or more")
    name = arguments.model or NANO
    chat_model = load(name)
    generator = BatchGenerator(chat_model, batch_size=1)
    title = f"{name}, {chat_model.engine.model.config.num_parameters:,} parameters"
    print(f"{title}; seconds include compilation, which the cache saves in later runs")
    answers = []
    for number, task in enumerate(TASKS[arguments.seed % 2], start=1):
        answer = answer_question(generator, task, arguments.seed, arguments.max_new_tokens)
        answers.append(answer)
        verdict = "right" if answer.correct else "wrong"
        print(f"\n{number}. {answer.question}  ({task})")
        print(f"   answer     {demo_report.one_line(answer.answer)}")
        print(f"   reference  {demo_report.one_line(answer.reference)}")
        print(f"   {verdict}{f', {answer.detail}' if answer.detail else ''}; {answer.statistics}", flush=True)
    correct = sum(answer.correct for answer in answers)
    demo_report.write(report, answers, title)
    print(f"\n{correct} of {len(answers)} right; images, videos and answers are in {report}")


def answer_question(generator, task: str, seed: int, max_new_tokens: int) -> demo_report.DemoAnswer:
    """Asks the first held-out question of a task.

    Args:
      generator: The model, a `vl3_jax.evaluation.batch_generator.BatchGenerator`.
      task: Name of the synthetic task.
      seed: Random seed of the question.
      max_new_tokens: Maximum number of tokens of the answer.
    """
    from data_pipelines.synthetic.registry import STREAM, TASKS, example
    from vl3_jax.evaluation import live_streams, nano_tasks

    sample = example(task, "test", seed, 0)
    question = nano_tasks.question(task, sample, 0)
    reference = question.reference
    started = time.perf_counter()
    if TASKS[task].media == STREAM:
        (state,) = live_streams.run_streams(generator, [(question.media(), question.text)], max_new_tokens)
        visuals, answer = [state.visual], state.words
        prompt_tokens, new_tokens = len(state.tokens), state.new_tokens
        correct = [_normalise(word) for word in answer] == [_normalise(word) for word in reference["words"]]
        detail, boxes = "", {}
    else:
        processed = generator.process(question.media(), question.text)
        (reply,) = generator.generate([processed.sample], max_new_tokens)
        visuals, answer = processed.sample.visuals, reply.text
        prompt_tokens, new_tokens = len(processed.sample.tokens), reply.new_tokens
        correct, detail, boxes = _judge(task, answer, reference)
    seconds = time.perf_counter() - started
    kept, total = sum(visual.num_tokens for visual in visuals), sum(len(visual.keep) for visual in visuals)
    return demo_report.DemoAnswer(
        task=task,
        question=question.text,
        answer=answer,
        reference=reference["words"] if "words" in reference else reference["answer"],
        correct=correct,
        detail=detail,
        boxes=boxes,
        visuals=list(visuals),
        times=sample.video.times if sample.video else None,
        statistics=f"{kept} of {total} vision tokens kept, {prompt_tokens} tokens of prompt, {new_tokens} of answer, "
        f"{seconds:.2f} s",
    )


def _judge(task: str, answer: str, reference: dict[str, Any]) -> tuple[bool, str, dict[str, list[float]]]:
    """Returns whether the answer is right, its overlap with the reference as text, and the boxes for the report."""
    from data_pipelines.synthetic import scoring
    from data_pipelines.synthetic.registry import BOX, SPAN, TASKS

    metric, value = TASKS[task].metric, scoring.score(task, answer, reference)
    if metric == SPAN:
        return value >= _MIN_SCORE, f"overlap {value:.2f}", {}
    if metric == BOX:
        boxes = {"reference": parsing.parse_boxes(reference["answer"])[0]}
        if answered := parsing.parse_boxes(answer):
            boxes["answer"] = answered[0]
        return value >= _MIN_SCORE, f"overlap {scoring.best_iou(answer, reference):.2f}", boxes
    return value == 1, "", {}


def _normalise(word: str | None) -> str | None:
    return None if word is None else parsing.normalise(word)
