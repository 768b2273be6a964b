"""`vl3 demo`: six questions about pictures and clips that the model has never seen, answered on this machine."""

import argparse
import pathlib
import time
from typing import Any

from data_pipelines.synthetic import parsing
from vl3_jax.cli import demo_report
from vl3_jax.errors import InputError

EPILOG = """Pictures and clips are drawn anew from held-out handwritten digits and things to wear; another --seed draws
others. The report shows them as the model saw them: what the frame pruner left out is dim.

exit codes: 0 done, 2 bad input (one line on stderr says which), 1 a failure of ours"""

# Of an even and an odd seed.
TASKS = (("digit", "ocr", "box", "motion", "when", "static"), ("fashion", "count", "box", "motion", "when", "stream"))
_RIGHT = 0.5  # overlap of a box or span with the true one from which it counts as right


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.epilog = EPILOG
    parser.add_argument("--model", metavar="M", help="any checkpoint that `vl3 ask` takes (default: nano)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default: 0)")
    parser.add_argument("--out", default="demo.html", metavar="FILE", help="the report (default: demo.html)")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="of an answer (default: 48)")


def run(arguments: argparse.Namespace) -> None:
    """Asks, prints and writes the report."""
    from vl3_jax.checkpoint import bundled
    from vl3_jax.evaluation.batch_generator import BatchGenerator
    from vl3_jax.inference.chat_model import load

    report = pathlib.Path(arguments.out)
    if not report.absolute().parent.is_dir():
        raise InputError(f"{report}: there is no folder {report.parent}; make it or choose another --out")
    if arguments.seed < 0:
        raise InputError(f"seed {arguments.seed}: give 0 or more")
    model = arguments.model or bundled.NANO
    assistant = load(model)
    answerer = BatchGenerator(assistant, batch=1)
    size = f"{model}, {assistant.engine.model.config.num_parameters:,} parameters"
    print(f"{size}; seconds include compiling, which a second run does without")
    outcomes = []
    for number, task in enumerate(TASKS[arguments.seed % 2], start=1):
        one = answered(answerer, task, arguments.seed, arguments.max_new_tokens)
        outcomes.append(one)
        print(f"\n{number}. {one.question}  ({task})")
        print(f"   answer  {demo_report.spoken(one.answer)}")
        print(f"   truth   {demo_report.spoken(one.truth)}")
        print(f"   {'right' if one.right else 'wrong'}{f', {one.note}' if one.note else ''}; {one.facts}", flush=True)
    right = sum(one.right for one in outcomes)
    demo_report.write(report, outcomes, size)
    print(f"\n{right} of {len(outcomes)} right; pictures, clips and answers are in {report}")


def answered(answerer, task: str, seed: int, max_new_tokens: int) -> demo_report.DemoAnswer:
    """Asks the first held-out question of a task and a seed.

    Args:
      answerer: see `vl3_jax.evaluation.batch_generator`.
      task: of the synthetic tasks.
      seed: of the question.
      max_new_tokens: of the answer.
    """
    from data_pipelines.synthetic.registry import STREAM, TASKS, example
    from vl3_jax.evaluation import live_streams, nano_tasks

    drawn = example(task, "test", seed, 0)
    question = nano_tasks.question(task, drawn, 0)
    truth = question.truth
    started = time.perf_counter()
    if TASKS[task].media == STREAM:
        (stream,) = live_streams.run_streams(answerer, [(question.media(), question.text)], max_new_tokens)
        visuals, answer, prompt, new = [stream.visual], stream.words, len(stream.tokens), stream.new_tokens
        right, note, boxes = [_plain(word) for word in answer] == [_plain(word) for word in truth["words"]], "", {}
    else:
        processed = answerer.process(question.media(), question.text)
        (reply,) = answerer.answer([processed.sample], max_new_tokens)
        visuals, answer, prompt = processed.sample.visuals, reply.text, len(processed.sample.tokens)
        new = reply.new_tokens
        right, note, boxes = _judged(task, answer, truth)
    seconds = time.perf_counter() - started
    kept, before = sum(one.num_tokens for one in visuals), sum(len(one.keep) for one in visuals)
    facts = f"{kept} of {before} vision tokens kept, {prompt} tokens of prompt, {new} of answer, {seconds:.2f} s"
    return demo_report.DemoAnswer(
        task=task,
        question=question.text,
        answer=answer,
        truth=truth["words"] if "words" in truth else truth["answer"],
        right=right,
        note=note,
        boxes=boxes,
        visuals=list(visuals),
        times=drawn.clip.times if drawn.clip else None,
        facts=facts,
    )


def _judged(task: str, answer: str, truth: dict[str, Any]) -> tuple[bool, str, dict[str, list[float]]]:
    """Whether it is right, how good it is, and the boxes to be drawn."""
    from data_pipelines.synthetic import scoring
    from data_pipelines.synthetic.registry import BOX, SPAN, TASKS

    metric, value = TASKS[task].metric, scoring.score(task, answer, truth)
    if metric == SPAN:
        return value >= _RIGHT, f"overlap {value:.2f}", {}
    if metric == BOX:
        found = {"truth": parsing.parse_boxes(truth["answer"])[0]}
        if given := parsing.parse_boxes(answer):
            found["answer"] = given[0]
        return value >= _RIGHT, f"overlap {scoring.best_iou(answer, truth):.2f}", found
    return value == 1, "", {}


def _plain(word: str | None) -> str | None:
    return None if word is None else parsing.normalise(word)
