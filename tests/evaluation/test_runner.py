"""The runner: answers side by side equal single answers, media are decoded and encoded once, runs are resumed."""

import json

import pytest

from support.benchmark_items import CASES
from vl3_jax.errors import InputError
from vl3_jax.evaluation import layouts
from vl3_jax.evaluation.answer_file import ANSWERS, answered, is_valid, open_answers, read
from vl3_jax.evaluation.benchmarks import find
from vl3_jax.evaluation.benchmarks.synthetic import QuestionSelection
from vl3_jax.evaluation.prompts import media_groups, questions_of, swap_media
from vl3_jax.evaluation.protocol import EvalProtocol
from vl3_jax.evaluation.runner import Runner
from vl3_jax.processing.processor import Processor
from vl3_jax.storage.shards import Shard

SELECTION = QuestionSelection(count=3, seed=1)
SETTINGS = {"model": "small"}
NAMES = ["nano/digit", "nano/static"]
SHORT = EvalProtocol(max_new_tokens=4, max_visual_tokens=64)
pytestmark = pytest.mark.usefixtures("fast_compile")


def questions(names=NAMES, settings=SETTINGS, root=None):
    return [
        question
        for benchmark in find(names, SELECTION)
        for question in questions_of(benchmark, benchmark.load(root), settings)
    ]


def ask(chat_model, asked, protocol=None, batch_size=4):
    """Returns the records by id."""
    return {record["id"]: record for record in Runner(chat_model, protocol, batch_size).ask(asked)}


@pytest.fixture(scope="module")
def records(chat_model):
    return ask(chat_model, questions())


def test_answers_side_by_side_equal_single_answers(chat_model, records):
    assert len(records) == 6
    for question in questions()[1::3]:
        item, record = question.item, records[question.id]
        answer = chat_model.answer(item.messages(None), max_new_tokens=question.benchmark.max_new_tokens)
        expected = (answer.text.strip(), len(answer.processed.sample.tokens), len(answer.token_ids))
        assert (record["answer"], record["prompt_tokens"], record["new_tokens"]) == expected
        assert record["reference"] == item.reference
        assert record["task"] == question.benchmark.task


def test_every_number_of_questions_side_by_side_gives_the_same_answers(chat_model, records):
    for batch_size in (1, 3):
        assert ask(chat_model, questions(), batch_size=batch_size) == records


def test_a_killed_run_is_resumed(chat_model, records, tmp_path):
    asked, lines = questions(), [json.dumps(record) + "\n" for record in records.values()]
    hashes = {question.id: question.hash for question in asked}
    (tmp_path / ANSWERS).write_text("".join(lines[:4]) + lines[4][:30])
    with open_answers(tmp_path, SETTINGS) as journal:
        before = answered(read(tmp_path), hashes)
        pending = [question for question in asked if question.id not in before]
        assert len(pending) == 2
        new = ask(chat_model, pending)
        for record in new.values():
            journal.append(record)
    assert {record["id"]: record for record in read(tmp_path / ANSWERS)} == records
    assert answered(read(tmp_path), hashes) == records


def test_only_answers_to_the_same_prompt_count(records):
    same = {question.id: question.hash for question in questions()}
    other = {question.id: question.hash for question in questions(settings={"model": "large"})}
    assert len(answered(list(records.values()), same)) == 6
    assert not answered(list(records.values()), other)
    first = next(iter(records.values()))
    failed = first | {"answer": None, "error": "no memory"}
    assert is_valid(answered([first, failed], same)[first["id"]])
    assert not is_valid(answered([failed], same)[first["id"]])


def test_answers_of_another_run_are_not_mixed(tmp_path):
    with open_answers(tmp_path, SETTINGS):
        pass
    with (
        pytest.raises(InputError, match="model: 'small' there, 'large' now"),
        open_answers(tmp_path, SETTINGS | {"model": "large"}),
    ):
        pass


def test_one_process_writes_a_shard(tmp_path):
    with open_answers(tmp_path, SETTINGS, Shard(1, 2)), open_answers(tmp_path, SETTINGS, Shard(2, 2)):
        with pytest.raises(InputError, match="is writing it"), open_answers(tmp_path, SETTINGS, Shard(1, 2)):
            pass
        assert sorted(path.name for path in tmp_path.glob("answers*")) == [
            "answers-1-of-2.jsonl",
            "answers-2-of-2.jsonl",
        ]


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "1/2/3"])
def test_bad_shards(text):
    with pytest.raises(InputError, match="--shard"):
        Shard.parse(text)


def test_shards_have_every_group_once():
    groups = media_groups(questions())
    for count in (1, 2, 4, 7):
        parts = [Shard.parse(f"{number}/{count}").of(groups) for number in range(1, count + 1)]
        assert sorted(id(group) for part in parts for group in part) == sorted(map(id, groups))


def test_five_questions_on_one_clip_decode_and_encode_it_once(chat_model, monkeypatch, tmp_path):
    (row, _) = CASES["lvbench"].rows
    rows = [row | {"uid": str(number), "question": f"Who {number}?\n(A) Ann\n(B) Bob"} for number in range(5)]
    layouts.write("lvbench", rows, tmp_path / "lvbench")
    asked = questions(["lvbench"], root=tmp_path)
    assert len(media_groups(asked)) == 1
    decoded, requests, submit = [], [], chat_model.engine.submit
    read_frames = Processor._decode_frames
    monkeypatch.setattr(
        Processor, "_decode_frames", lambda self, reader: decoded.append(1) or read_frames(self, reader)
    )
    monkeypatch.setattr(chat_model.engine, "submit", lambda request: requests.append(submit(request)) or requests[-1])
    chat_model.engine.forget()
    found = ask(chat_model, asked, SHORT)
    assert len(found) == 5
    assert all(is_valid(record) for record in found.values())
    assert len(decoded) == 1
    assert [generation.encoded_patches > 0 for generation in requests] == [True, *[False] * 4]


def test_what_cannot_be_asked_is_an_error_of_its_own(chat_model, tmp_path):
    rows = [row | {"question_id": str(number)} for number, row in enumerate(CASES["charades_sta"].rows)]
    rows[0] |= {"video": "gone.mp4"}
    layouts.write("charades_sta", rows, tmp_path / "charades_sta")
    asked = questions(["charades_sta"], root=tmp_path)
    (gone,) = tmp_path.rglob("gone.mp4")
    gone.unlink()
    first, second = ask(chat_model, asked, SHORT).values()
    failed, other = sorted((first, second), key=is_valid)
    assert "gone.mp4" in failed["error"]
    assert failed["missing_media"]
    assert is_valid(other)
    long = ask(chat_model, asked[1:], EvalProtocol(max_new_tokens=10**6))
    assert "context" in next(iter(long.values()))["error"]


def test_blind_questions_are_answered_from_other_media(chat_model):
    (benchmark,) = find(["nano/digit"], SELECTION)
    items = benchmark.items()
    records = ask(chat_model, questions_of(benchmark, swap_media(benchmark, items), SETTINGS))
    for number, item in enumerate(items):
        content = [*items[(number + 1) % 3].content(None)[:-1], {"type": "text", "text": item.text}]
        expected = chat_model.answer([{"role": "user", "content": content}], max_new_tokens=benchmark.max_new_tokens)
        assert records[f"nano/digit/{number}"]["answer"] == expected.text.strip()
        assert records[f"nano/digit/{number}"]["reference"] == item.reference


def test_without_pruning_every_token_is_kept(chat_model, records):
    for name, record in ask(chat_model, questions(["nano/static"]), EvalProtocol(prune=False)).items():
        assert record["visual_tokens"] == record["visual_tokens_before_pruning"]
        assert records[name]["visual_tokens"] < record["visual_tokens"]


def test_a_system_prompt_stands_in_front(chat_model, records):
    for name, record in ask(chat_model, questions(["nano/digit"]), EvalProtocol(system="Be brief.")).items():
        assert record["prompt_tokens"] > records[name]["prompt_tokens"]


def test_later_questions_of_the_same_sizes_compile_nothing(chat_model):
    asked = questions_of(benchmark := find(["nano/digit"], QuestionSelection(9, 3))[0], benchmark.items(), {})
    ask(chat_model, asked)
    before = chat_model.engine.compiled_programs
    chat_model.engine.forget()
    assert len(ask(chat_model, asked)) == 9
    assert chat_model.engine.compiled_programs == before


@pytest.mark.parametrize(("line", "message"), [("{", "line 2"), ('{"id": "nano/digit/0"}', "line 2"), ("[]", "line 2")])
def test_the_error_names_a_line_that_is_no_answer(tmp_path, line, message):
    file = tmp_path / ANSWERS
    file.write_text('{"id": "a", "task": "t", "answer": "x", "reference": {}}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read(file)
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "nothing.jsonl")
