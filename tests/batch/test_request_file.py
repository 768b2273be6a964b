"""The index of a file of requests: every line once, whatever it holds, in any number of shards."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl3_jax.batch import request_file
from vl3_jax.batch.request_file import RequestFile, key_of, request_line
from vl3_jax.errors import InputError, RunError
from vl3_jax.storage.shards import Shard

LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [b"", b"  ", b"{", b"[]", b'{"custom_id": 5}', b'{"custom_id": "\\ud800"}', b"\xff\xfe", b"{}"]
        ),
        st.integers(0, 3).map(lambda number: json.dumps({"custom_id": str(number)}).encode()),
        st.binary(max_size=12).map(lambda content: content.replace(b"\n", b"")),
    ),
    max_size=12,
)


@given(LINES, st.integers(1, 4), st.booleans())
def test_every_line_is_in_one_shard_and_has_a_key_of_its_own(tmp_path_factory, lines, count, is_ended):
    path = tmp_path_factory.mktemp("requests") / "requests.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * is_ended)
    requests = RequestFile(path)
    shards = [requests.lines_of(Shard(number, count)) for number in range(1, count + 1)]
    expected = [number for number, line in enumerate(lines) if line.strip()]
    assert sorted(np.concatenate(shards).tolist()) == expected
    assert len(set(requests.keys[expected].tolist())) == len(expected)
    for index in expected:
        line = requests.read(index)
        assert (line.number, line.content) == (index + 1, lines[index].strip())
        assert key_of(line.id) == line.key == int(requests.keys[index])
        assert request_line(line.number, line.content, line.duplicate_of) == line
    requests.close()


def test_the_first_of_a_name_is_asked(tmp_path):
    path = tmp_path / "requests.jsonl"
    names = ["a", "b", "a", "c", "a"]
    path.write_text("\n".join(json.dumps({"custom_id": name, "body": {}}) for name in names))
    requests = RequestFile(path)
    assert [requests.read(index).duplicate_of for index in range(5)] == [None, None, 1, None, 1]
    # Keys are those of the content, wherever it stands, but for lines that stand in the way of others.
    path.write_text("\n".join(["", *(json.dumps({"custom_id": name, "body": {}}) for name in reversed("abc"))]))
    assert set(RequestFile(path).keys[1:].tolist()) == set(requests.keys[[0, 1, 3]].tolist())


def test_a_line_that_is_too_long_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(request_file, "MOST_BYTES", 50)
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b'{"custom_id": "a"}\n' + b"x" * 120 + b"\n" + b"y" * 49 + b"\n" + b"z" * 50)
    requests = RequestFile(path)
    assert [len(requests.read(index).content) for index in requests.lines_of(Shard())] == [18, 0, 49, 50]
    with pytest.raises(InputError, match="more than 50 bytes"):
        request_file.parse_line(requests.read(1).content)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"custom_id": "a"}\n')
    requests = RequestFile(path)
    path.write_text('{"custom_id": "b"}\n')
    with pytest.raises(RunError, match=r"requests.jsonl, line 1: has changed"):
        requests.read(0)
    with pytest.raises(InputError, match="no such file"):
        RequestFile(tmp_path / "none")
