"""The runner: batched answers equal single answers, interrupted runs are resumed, blind questions get other media."""

import json

import pytest
from vl3_jax.evaluation.batch_generator import BatchGenerator
from vl3_jax.evaluation.tasks import QuestionSelection, find

from vl3_jax.errors import InputError
from vl3_jax.evaluation.answer_file import ANSWERS, open_answers, read
from vl3_jax.evaluation.runner import ask, questions_of

SELECTION = QuestionSelection(count=3, seed=1)
SETTINGS = {"model": "small", "count": 3}
NAMES = ["nano/digit", "nano/static"]
pytestmark = pytest.mark.usefixtures("fast_compile")


def run(chat_model, folder, names=NAMES, batch_size=4, prune=True, blind=False, **options):
    """Returns the answers by id, and the number of questions asked."""
    with open_answers(folder, SETTINGS) as journal:
        task_questions = questions_of(find(names), SELECTION, blind)
        new = ask(BatchGenerator(chat_model, batch_size, prune), task_questions, journal, **options)
    return {record["id"]: record for record in read(folder / ANSWERS)}, len(new)


@pytest.fixture(scope="module")
def folder(chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(chat_model, folder)
    return folder


def answer_alone(chat_model, question, task, **settings):
    content = [*question.media(), {"type": "text", "text": question.text}]
    answer = chat_model.answer([{"role": "user", "content": content}], max_new_tokens=task.max_new_tokens, **settings)
    return answer.text.strip(), len(answer.processed.sample.tokens), len(answer.token_ids)


def test_batched_answers_equal_single_answers(chat_model, folder):
    records = {record["id"]: record for record in read(folder / ANSWERS)}
    assert len(records) == 6
    for task in find(NAMES):
        question = task.questions(SELECTION)[1]
        record = records[question.id]
        expected = answer_alone(chat_model, question, task)
        assert (record["answer"], record["prompt_tokens"], record["new_tokens"]) == expected
        assert record["reference"] == question.reference
        assert record["task"] == task.name


def test_a_killed_run_is_resumed(chat_model, folder, tmp_path):
    lines = (folder / ANSWERS).read_text().splitlines(keepends=True)
    (tmp_path / ANSWERS).write_text("".join(lines[:4]) + lines[4][:30])
    progress = []
    records, asked = run(chat_model, tmp_path, on_progress=lambda task, done: progress.append(done))
    assert asked == 2
    assert records == {record["id"]: record for record in map(json.loads, lines)}
    assert sum(progress) == 6
    before = (tmp_path / ANSWERS).read_bytes()
    assert before.startswith("".join(lines[:4]).encode())
    assert run(chat_model, tmp_path)[1] == 0
    assert (tmp_path / ANSWERS).read_bytes() == before


def test_answers_of_another_run_are_not_mixed(chat_model, folder):
    with (
        pytest.raises(InputError, match="model: 'small' there, 'large' now"),
        open_answers(folder, SETTINGS | {"model": "large"}),
    ):
        pass


def test_blind_questions_are_answered_from_other_media(chat_model, tmp_path):
    records, _ = run(chat_model, tmp_path, ["nano/digit"], blind=True)
    (task,) = find(["nano/digit"])
    questions = task.questions(SELECTION)
    for number, question in enumerate(questions):
        other = questions[(number + 1) % 3]
        content = [*other.media(), {"type": "text", "text": question.text}]
        expected = chat_model.answer([{"role": "user", "content": content}], max_new_tokens=task.max_new_tokens)
        assert records[question.id]["answer"] == expected.text.strip()
        assert records[question.id]["reference"] == question.reference


def test_without_pruning_every_token_is_kept(chat_model, folder, tmp_path):
    unpruned, _ = run(chat_model, tmp_path, ["nano/static"], prune=False)
    pruned = {record["id"]: record for record in read(folder / ANSWERS)}
    for name, record in unpruned.items():
        assert record["visual_tokens"] == record["visual_tokens_before_pruning"]
        assert pruned[name]["visual_tokens"] < record["visual_tokens"]


def test_later_questions_of_the_same_sizes_compile_nothing(chat_model):
    generator = BatchGenerator(chat_model, 4)
    (task,) = find(["nano/digit"])
    questions = task.questions(QuestionSelection(count=9, seed=3))
    samples = [generator.process(question.media(), question.text).sample for question in questions]
    generator.generate(samples, task.max_new_tokens)
    before = chat_model.engine.compiled_programs
    chat_model.engine.forget()
    assert len(generator.generate(samples, task.max_new_tokens)) == 9
    assert chat_model.engine.compiled_programs == before


@pytest.mark.parametrize(("line", "message"), [("{", "line 2"), ('{"id": "nano/digit/0"}', "line 2"), ("[]", "line 2")])
def test_the_error_names_a_line_that_is_no_answer(tmp_path, line, message):
    file = tmp_path / ANSWERS
    file.write_text('{"id": "a", "task": "t", "answer": "x", "reference": {}}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read(file)
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "nothing.jsonl")
