"""Asks a model the questions of several tasks, in batches, and writes each answer down as it comes."""

from collections.abc import Callable, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.answer_file import AnswerFile
from vl3_jax.evaluation.batch_generator import BatchGenerator
from vl3_jax.evaluation.live_streams import run_streams
from vl3_jax.evaluation.tasks import EvalTask, Question, QuestionSelection
from vl3_jax.processing.processor import ProcessorOutput

_BATCHES_AT_ONCE = 8  # as many are drawn and sorted by size together; with more, media would fill the memory
_STREAM_BATCHES_AT_ONCE = 2


Asked = list[tuple[EvalTask, list[Question]]]


def questions_of(tasks: Sequence[EvalTask], selection: QuestionSelection, without_media: bool = False) -> Asked:
    """The questions of each task.

    Args:
      tasks: what to ask.
      selection: which questions of each.
      without_media: give each question the media of another one; tasks without media are left out.

    Raises:
      InputError: a selection that there is not; nothing to be blind to.
    """
    if not without_media:
        return [(task, task.questions(selection)) for task in tasks]
    tasks = [task for task in tasks if task.has_media]
    if not tasks:
        raise InputError("a blind check needs tasks with media; these have none")
    return [(task, without_media(task.questions(selection))) for task in tasks]


def ask(
    answerer: BatchGenerator,
    asked: Asked,
    answers: AnswerFile,
    on_progress: Callable[[str, int], None] = lambda task, done: None,
) -> int:
    """Asks what `answers` does not hold yet.

    Args:
      answerer: of the model.
      asked: tasks with their questions.
      answers: where answers go.
      on_progress: told the task and how many more of its questions are answered; first of all those of earlier runs.

    Returns:
      How many questions were asked.

    Raises:
      InputError: what a question's media or the model's context make impossible.
    """
    new = 0
    for task, questions in asked:
        left = [one for one in questions if one.id not in answers.records]
        on_progress(task.name, len(questions) - len(left))
        for records in _answered(answerer, task, left):
            answers.append(records)
            new += len(records)
            on_progress(task.name, len(records))
    return new


def _answered(answerer: BatchGenerator, task: EvalTask, questions: Sequence[Question]):
    """Records of a task's questions, some at a time, not in their order."""
    together = answerer.rows(task.bucket_sizes) * (_STREAM_BATCHES_AT_ONCE if task.is_stream else _BATCHES_AT_ONCE)
    for some in _batched(questions, together):
        if task.is_stream:
            yield _stream_records(answerer, task, some)
            continue
        processed = [(one, answerer.process(one.media(), one.text)) for one in some]
        processed.sort(key=lambda pair: _size(pair[1]))
        for chunk in _batched(processed, answerer.rows(task.bucket_sizes)):
            replies = answerer.answer([shown.sample for _, shown in chunk], task.max_new_tokens, task.bucket_sizes)
            yield [
                _record(task, question, reply.text)
                | {"finish_reason": reply.finish_reason, "new_tokens": reply.new_tokens}
                | _seen(len(shown.sample.tokens), shown.visual_tokens, shown.visual_tokens_before_pruning)
                for (question, shown), reply in zip(chunk, replies, strict=True)
            ]


def _stream_records(answerer: BatchGenerator, task: EvalTask, questions: Sequence[Question]) -> list[dict[str, Any]]:
    streams = run_streams(
        answerer, [(one.media(), one.text) for one in questions], task.max_new_tokens, task.bucket_sizes
    )
    return [
        _record(task, question, stream.words)
        | {"new_tokens": stream.new_tokens}
        | _seen(len(stream.tokens), stream.visual.num_tokens, len(stream.visual.keep))
        for question, stream in zip(questions, streams, strict=True)
    ]


def _record(task: EvalTask, question: Question, answer: Any) -> dict[str, Any]:
    return {
        "id": question.id,
        "task": task.name,
        "question": question.text,
        "answer": answer,
        "truth": dict(question.truth),
    }


def _seen(prompt_tokens: int, visual_tokens: int, before: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "visual_tokens": visual_tokens, "visual_tokens_before_pruning": before}


def _size(processed: ProcessorOutput) -> tuple[int, int]:
    """What decides about the shape of a batch: patches first, for most of the work is theirs."""
    sample = processed.sample
    return sum(len(visual.patches) for visual in sample.visuals), len(sample.tokens)


def _batched(items: Sequence[Any], size: int):
    return (items[start : start + size] for start in range(0, len(items), size))
