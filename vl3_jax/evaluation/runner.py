"""Asks a model the questions of several tasks in batches, and writes each batch of answers to a file."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.batch_generator import BatchGenerator
from vl3_jax.evaluation.live_streams import run_streams
from vl3_jax.evaluation.tasks import EvalTask, Question, QuestionSelection, swap_media
from vl3_jax.processing.packed_batch import Visual
from vl3_jax.storage.journal import Journal

_BATCHES_PER_GROUP = 2  # batches whose samples are processed and answered together; bounds the memory for media

TaskQuestions = list[tuple[EvalTask, list[Question]]]


def questions_of(tasks: Sequence[EvalTask], selection: QuestionSelection, blind: bool = False) -> TaskQuestions:
    """Returns the questions of each task.

    Args:
      tasks: Tasks to ask.
      selection: Which questions of each task to ask.
      blind: Whether to give each question the media of another one. Tasks without media are then left out.

    Raises:
      InputError: The selection is impossible, or no task is left.
    """
    if not blind:
        return [(task, task.questions(selection)) for task in tasks]
    tasks = [task for task in tasks if task.has_media]
    if not tasks:
        raise InputError("a blind check needs tasks with media; these have none")
    return [(task, swap_media(task.questions(selection))) for task in tasks]


def ask(
    generator: BatchGenerator,
    task_questions: TaskQuestions,
    journal: Journal,
    on_progress: Callable[[str, int], None] = lambda task, done: None,
) -> list[dict[str, Any]]:
    """Asks all questions that have no answer yet.

    Args:
      generator: The model.
      task_questions: Tasks with their questions.
      journal: The answers of earlier runs, to which the new ones are appended.
      on_progress: Called with a task and the number of its questions answered since the last call. The first call of
        a task counts the answers of earlier runs.

    Returns:
      The new answers.

    Raises:
      InputError: The media of a question cannot be processed, or a prompt exceeds the model's context.
    """
    answered, new = {record["id"] for record in journal.entries}, []
    for task, questions in task_questions:
        pending = [question for question in questions if question.id not in answered]
        on_progress(task.name, len(questions) - len(pending))
        for records in answer(generator, task, pending):
            for record in records:
                journal.append(record)
            new += records
            on_progress(task.name, len(records))
    return new


def answer(generator: BatchGenerator, task: EvalTask, questions: Sequence[Question]) -> Iterator[list[dict[str, Any]]]:
    """Yields the answers to a task's questions group by group.

    Raises:
      InputError: As `ask`.
    """
    for group in _chunks(questions, _BATCHES_PER_GROUP * generator.batch_size):
        if task.is_stream:
            streams = [(question.media(), question.text) for question in group]
            states = run_streams(generator, streams, task.max_new_tokens)
            yield [
                _record(task, question, state.words, state.new_tokens, len(state.tokens), [state.visual])
                for question, state in zip(group, states, strict=True)
            ]
            continue
        samples = [generator.process(question.media(), question.text).sample for question in group]
        replies = generator.generate(samples, task.max_new_tokens)
        yield [
            _record(task, question, reply.text, reply.new_tokens, len(sample.tokens), sample.visuals)
            | {"finish_reason": reply.finish_reason}
            for question, sample, reply in zip(group, samples, replies, strict=True)
        ]


def _record(
    task: EvalTask, question: Question, answer: Any, new_tokens: int, prompt_tokens: int, visuals: Sequence[Visual]
) -> dict[str, Any]:
    return {
        "id": question.id,
        "task": task.name,
        "question": question.text,
        "answer": answer,
        "reference": dict(question.reference),
        "new_tokens": new_tokens,
        "prompt_tokens": prompt_tokens,
        "visual_tokens": sum(visual.num_tokens for visual in visuals),
        "visual_tokens_before_pruning": sum(len(visual.keep) for visual in visuals),
    }


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
