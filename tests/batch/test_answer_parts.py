"""Files of answers: resumed, merged by the last one to end, never mixed with others, never cut off."""

import json

import numpy as np
import pytest

from vl3_jax.batch.answer_parts import ANSWERED, FAILED, PENDING, AnswerParts
from vl3_jax.errors import InputError
from vl3_jax.storage.shards import Shard

KEYS = np.array([7, 0, 3, 2**64 - 1], np.uint64)  # the second line is blank
USED = np.array([True, False, True, True])
SETTINGS = {"checkpoint": "a"}


def record(key, is_answer=True, text="yes"):
    response, error = (text, None) if is_answer else (None, {"code": text})
    return {"id": f"batch_req_{key:016x}", "custom_id": str(key), "response": response, "error": error}


@pytest.fixture
def parts(tmp_path):
    return AnswerParts(tmp_path / "answers.jsonl", KEYS, USED)


def write(path, *records, half=""):
    path.write_text("".join(json.dumps(each) + "\n" for each in records) + half)


def read(parts):
    return [json.loads(line) for line in parts.path.read_text().splitlines()]


def test_an_interrupted_run_is_resumed(parts):
    with parts.open(Shard(), SETTINGS) as (log, _):
        log.append(record(7))
        log.append(record(3, is_answer=False))
    with open(parts.path, "a") as file:
        file.write('{"id": "batch_r')
    assert parts.states().tolist() == [ANSWERED, PENDING, FAILED, PENDING]
    assert not parts.merge()
    with parts.open(Shard(), SETTINGS) as (log, _):
        log.append(record(2**64 - 1))
    assert parts.merge()
    assert read(parts) == [record(7), record(3, False), record(2**64 - 1)]


def test_the_last_one_to_end_merges(parts):
    with parts.open(Shard(1, 2), SETTINGS) as (first, _):
        with parts.open(Shard(2, 2), SETTINGS) as (second, _):
            first.append(record(7))
            second.append(record(3))
            second.append(record(2**64 - 1))
        assert not parts.merge()  # the first one may still write
    assert parts.merge()
    assert {each["id"] for each in read(parts)} == {record(int(key))["id"] for key in KEYS[USED]}
    assert [path.name for path in sorted(parts.path.parent.iterdir())] == ["answers.jsonl", "answers.jsonl.run.json"]


def test_a_part_begins_while_another_one_looks_whether_all_is_there(parts, monkeypatch):
    """As where fewer machines than parts are at work: each part begins when another one has ended."""
    states = parts.states
    with parts.open(Shard(1, 2), SETTINGS) as (log, _):
        log.append(record(7))

    def begins_meanwhile():
        monkeypatch.setattr(parts, "states", states)
        with parts.open(Shard(2, 2), SETTINGS) as (log, _):
            log.append(record(3))
        return states()

    monkeypatch.setattr(parts, "states", begins_meanwhile)
    assert not parts.merge()
    assert parts.states().tolist() == [ANSWERED, PENDING, ANSWERED, PENDING]


def test_the_last_answer_counts_else_the_last_failure(parts):
    write(parts.path, record(7, False), record(7, text="a"), record(7, False), record(3, False), record(99))
    last = parts.path.with_name("answers-2-of-3.jsonl")
    write(last, record(3, False, "newer"), record(2**64 - 1, text="b"), record(2**64 - 1, text="c"))
    assert parts.merge()
    assert read(parts) == [record(7, text="a"), record(3, False, "newer"), record(2**64 - 1, text="c")]
    assert not last.exists()


def test_processes_do_not_get_in_each_others_way(parts):
    with parts.open(Shard(1, 2), SETTINGS):
        for shard, message in ((Shard(1, 2), "is writing it"), (Shard(1, 3), "is writing it"), (Shard(), "is writing")):
            with pytest.raises(InputError, match=message), parts.open(shard, SETTINGS):
                pass
    with pytest.raises(InputError, match="checkpoint: 'a' there, 'b' now"), parts.open(Shard(), {"checkpoint": "b"}):
        pass


@pytest.mark.parametrize("content", ["a letter to my aunt", '{"id": "x"}\n{"id": "b', '{"id": "b', "\n"])
def test_a_file_of_something_else_stays_as_it_is(parts, content):
    parts.path.write_text(content)
    is_ours = content == '{"id": "b'  # as an answer begins
    if is_ours:
        with parts.open(Shard(), SETTINGS) as (_, states):
            assert states.tolist() == [PENDING] * 4
        assert parts.path.read_text() == ""
        return
    with pytest.raises(InputError, match=r"answers.jsonl.*give another --out"), parts.open(Shard(), SETTINGS):
        pass
    assert parts.path.read_text() == content
