"""`vl3 demo`: six questions about images and videos that the model has never seen, answered on this machine."""

import argparse
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from data_pipelines.synthetic import parsing
from data_pipelines.synthetic.registry import BOX, SPAN
from data_pipelines.synthetic.scoring import evaluate
from vl3_jax.cli import demo_report, generation_flags, settings_flags
from vl3_jax.config_tree import SEED
from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmarks import find
from vl3_jax.evaluation.benchmarks.synthetic import FAMILY, QuestionSelection, SyntheticBenchmark

EPILOG = """Images and videos are generated from held-out handwritten digits and clothes; another --seed gives other
ones. The report shows them as the model received them: what the frame pruner removed is dimmed.

exit codes: 0 done, 2 bad input (one line on stderr says which), 1 internal error"""

# Tasks of an even and of an odd seed.
TASKS = (("digit", "ocr", "box", "motion", "when", "static"), ("fashion", "count", "box", "motion", "when", "stream"))
_MIN_SCORE = 0.5  # score from which a box or span counts as right


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--model", metavar="M", help="any checkpoint that `vl3 ask` takes (default: nano)")
    parser.add_argument(
        "--seed",
        type=settings_flags.number(int, SEED),
        default=0,
        help="random seed of the questions (default: %(default)s)",
    )
    parser.add_argument("--out", default="demo.html", metavar="FILE", help="the report (default: demo.html)")
    length_help = "maximum number of tokens of an answer (default: %(default)s)"
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help=length_help)


def run(arguments: argparse.Namespace) -> None:
    """Asks the questions, prints the answers and writes the report."""
    from vl3_jax.checkpoint.opening import NANO
    from vl3_jax.evaluation.protocol import EvalProtocol
    from vl3_jax.evaluation.runner import Runner
    from vl3_jax.inference.open_model import load
    from vl3_jax.model import abstract_params, num_parameters

    with generation_flags.naming_flags():
        protocol = EvalProtocol(max_new_tokens=arguments.max_new_tokens)
    report = pathlib.Path(arguments.out)
    if not report.absolute().parent.is_dir():
        raise InputError(f"{report}: there is no folder {report.parent}; create it or choose another --out")
    selection = QuestionSelection(count=1, seed=arguments.seed)
    name = arguments.model or NANO
    chat_model = load(name)
    runner = Runner(chat_model, protocol, batch_size=1)
    title = f"{name}, {num_parameters(abstract_params(chat_model.engine.model.config)):,} parameters"
    print(f"{title}; seconds include compilation, which the cache saves in later runs")
    answers = []
    for number, task_name in enumerate(TASKS[arguments.seed % 2], start=1):
        (task,) = find([f"{FAMILY}/{task_name}"], selection)
        task.max_new_tokens = None
        answer = answer_question(runner, task)
        answers.append(answer)
        print(f"\n{number}. {answer.question}  ({task_name})")
        print(f"   answer     {demo_report.one_line(answer.answer)}")
        print(f"   reference  {demo_report.one_line(answer.reference)}")
        print(f"   {answer.verdict}{f', {answer.detail}' if answer.detail else ''}; {answer.statistics}", flush=True)
    correct = sum(answer.correct for answer in answers)
    demo_report.write(report, answers, title)
    print(f"\n{correct} of {len(answers)} right; images, videos and answers are in {report}")


def answer_question(runner, task: SyntheticBenchmark) -> demo_report.DemoAnswer:
    """Asks the first question of a task.

    Args:
      runner: Asks the model, a `vl3_jax.evaluation.runner.Runner`.
      task: The task.
    """
    from vl3_jax.evaluation.prompts import questions_of

    (question,) = questions_of(task, task.items()[:1], {})
    started = time.perf_counter()
    (record,) = runner.ask([question])
    seconds = time.perf_counter() - started
    (prompt,) = runner.prompter.prompts([question])
    if prompt.processed is None or "error" in record:
        raise InputError(f"{task.name}: {record['error']}")
    item, processed = question.item, prompt.processed
    correct, detail, boxes = judge(task, record["answer"], item.reference)
    return demo_report.DemoAnswer(
        task=task.name.removeprefix(f"{FAMILY}/"),
        question=item.text,
        answer=record["answer"],
        reference=item.reference.get("words", item.reference["answer"]),
        correct=correct,
        detail=detail,
        boxes=boxes,
        visuals=processed.sample.visuals,
        times=processed.videos[0].timestamps if processed.videos else None,
        statistics=f"{record['visual_tokens']} of {record['visual_tokens_before_pruning']} vision tokens kept, "
        f"{record['prompt_tokens']} tokens of prompt, {record['new_tokens']} of answer, {seconds:.2f} s",
    )


def judge(
    task: SyntheticBenchmark, answer: Any, reference: Mapping[str, Any]
) -> tuple[bool, str, dict[str, list[float]]]:
    """Returns whether the answer is right, its overlap with the reference as text, and the boxes for the report."""
    if task.is_stream:
        said, expected = (
            [word and parsing.normalise(word) for word in words] for words in (answer, reference["words"])
        )
        return said == expected, "", {}
    values = evaluate(task.name.removeprefix(f"{FAMILY}/"), [answer], [reference])
    correct = values["score"] >= _MIN_SCORE
    if task.metric == BOX:
        found = {"reference": parsing.parse_boxes(reference["answer"]), "answer": parsing.parse_boxes(answer)}
        return correct, f"overlap {values['mean_iou']:.2f}", {name: boxes[0] for name, boxes in found.items() if boxes}
    return correct, f"overlap {values['score']:.2f}" if task.metric == SPAN else "", {}
