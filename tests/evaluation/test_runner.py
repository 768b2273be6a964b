"""The runner: batches give what each question alone gives, runs go on where they stopped, media are swapped."""

import json

import pytest

from vl3_jax.errors import InputError
from vl3_jax.evaluation.answer_file import ANSWERS, AnswerFile, read
from vl3_jax.evaluation.batch_generator import BatchGenerator
from vl3_jax.evaluation.runner import ask, questions_of
from vl3_jax.evaluation.tasks import QuestionSelection, find

SELECTION = QuestionSelection(count=3, seed=1)
SETTINGS = {"model": "small", "count": 3}
NAMES = ["nano/digit", "nano/static"]


def run(assistant, folder, names=NAMES, batch=4, prune=True, without_media=False, **options):
    """Answers by id, and how many were asked for."""
    with AnswerFile(folder, SETTINGS) as answers:
        asked = questions_of(find(names), SELECTION, without_media)
        new = ask(BatchGenerator(assistant, batch, prune), asked, answers, **options)
    return {record["id"]: record for record in read(folder / ANSWERS)}, new


@pytest.fixture(scope="module")
def folder(assistant, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(assistant, folder)
    return folder


def alone(assistant, question, task, **settings):
    content = [*question.media(), {"type": "text", "text": question.text}]
    answer = assistant.answer([{"role": "user", "content": content}], max_new_tokens=task.max_new_tokens, **settings)
    return answer.text.strip(), len(answer.processed.sample.tokens), len(answer.token_ids)


def test_a_batch_answers_as_each_question_alone(assistant, folder):
    records = {record["id"]: record for record in read(folder / ANSWERS)}
    assert len(records) == 6
    for task in find(NAMES):
        question = task.questions(SELECTION)[1]
        record = records[question.id]
        expected = alone(assistant, question, task)
        assert (record["answer"], record["prompt_tokens"], record["new_tokens"]) == expected
        assert record["truth"] == question.truth
        assert record["task"] == task.name


def test_a_killed_run_goes_on(assistant, folder, tmp_path):
    lines = (folder / ANSWERS).read_text().splitlines(keepends=True)
    (tmp_path / ANSWERS).write_text("".join(lines[:4]) + lines[4][:30])
    progress = []
    records, asked = run(assistant, tmp_path, on_progress=lambda task, done: progress.append(done))
    assert asked == 2
    assert records == {record["id"]: record for record in map(json.loads, lines)}
    assert sum(progress) == 6
    before = (tmp_path / ANSWERS).read_bytes()
    assert before.startswith("".join(lines[:4]).encode())
    assert run(assistant, tmp_path)[1] == 0
    assert (tmp_path / ANSWERS).read_bytes() == before


def test_answers_of_another_run_are_not_mixed(assistant, folder):
    with pytest.raises(InputError, match="model: 'small' there, 'large' now"):
        AnswerFile(folder, SETTINGS | {"model": "large"})


def test_blind_questions_are_answered_from_other_media(assistant, tmp_path):
    records, _ = run(assistant, tmp_path, ["nano/digit"], without_media=True)
    (task,) = find(["nano/digit"])
    questions = task.questions(SELECTION)
    for number, question in enumerate(questions):
        other = questions[(number + 1) % 3]
        content = [*other.media(), {"type": "text", "text": question.text}]
        expected = assistant.answer([{"role": "user", "content": content}], max_new_tokens=task.max_new_tokens)
        assert records[question.id]["answer"] == expected.text.strip()
        assert records[question.id]["truth"] == question.truth


def test_without_pruning_every_token_is_seen(assistant, folder, tmp_path):
    whole, _ = run(assistant, tmp_path, ["nano/static"], prune=False)
    pruned = {record["id"]: record for record in read(folder / ANSWERS)}
    for name, record in whole.items():
        assert record["visual_tokens"] == record["visual_tokens_before_pruning"]
        assert pruned[name]["visual_tokens"] < record["visual_tokens"]


def test_batches_share_compiled_programs(assistant):
    answerer = BatchGenerator(assistant, 4)
    (task,) = find(["nano/digit"])
    shown = [
        answerer.process(one.media(), one.text).sample for one in task.questions(QuestionSelection(count=9, seed=3))
    ]
    answerer.answer(shown[:2], task.max_new_tokens, task.bucket_sizes)
    before = assistant.engine.compiled_programs
    together = answerer.answer(shown, task.max_new_tokens, task.bucket_sizes)
    assert assistant.engine.compiled_programs == before
    assert len(together) == 9


@pytest.mark.parametrize(("line", "message"), [("{", "line 2"), ('{"id": "nano/digit/0"}', "line 2"), ("[]", "line 2")])
def test_a_line_that_is_no_answer_is_named(tmp_path, line, message):
    file = tmp_path / ANSWERS
    file.write_text('{"id": "a", "task": "t", "answer": "x", "truth": {}}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read(file)
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "nothing.jsonl")
