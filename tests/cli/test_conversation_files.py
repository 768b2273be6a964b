"""`vl3 ask --conversation` with files as people have them: what is wrong is one line, before a model is loaded."""

import json

import pytest

from vl3_jax.cli import ask
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError

TALK = [{"role": "user", "content": "caf\u00e9"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"role":"user","content":[{"type":"video","video":"base.mp4","max_frames":NaN},"q"]}]',
            "message 1, part 1: max_frames is nan; give a number",
        ),
        (
            '[{"role":"user","content":[{"type":"video","video":"base.mp4","timestamps":3},"q"]}]',
            "message 1, part 1: timestamps is 3; give a list",
        ),
        ('[{"role":"user","content":"caf\\udce9"}]', r"message 1, part 1: character 4 of the text is '\udce9'"),
        ('[{"role":"user","content":[{"video":"a.mp4","fps":1,"fps":2}]}]', "'fps' occurs twice"),
        ('[{"role":"user","content":[{"video":"a.mp4","fps":1e999}]}]', "part 1: fps is inf"),
        ('[{"role":"user","content":[{"video":"a.mp4","fpss":1}]}]', "part 1: unknown key 'fpss'"),
        ('[{"role":"user","content":[{"video":"a.mp4","fps":' + "9" * 5000 + "}]}]", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"messages": []}', "expected a list of messages"),
        ("[]", "give at least one"),
        ('[{"role":"user",\n"content": }]', "line 2: not JSON"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"", "line 1: not JSON"),
    ],
)
def test_a_bad_conversation_is_one_line(tmp_path, capsys, content, message):
    file = tmp_path / "talk.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["ask", "--model", "M", "--conversation", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vl3 ask: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("name", ["nothing.json", ".", "n" * 100_000, "a\x1b[31m.json"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert main(["ask", "--model", "M", "--conversation", name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.rstrip("\n").isprintable()
    assert len(error) < 400


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_read(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(TALK, ensure_ascii=False), encoding)
    assert ask.read_conversation(str(file)) == TALK


def test_keys_of_different_objects_may_be_equal(tmp_path):
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(TALK * 3))
    assert len(ask.read_conversation(str(file))) == 3
    file.write_text('[{"role": "user", "role": "system", "content": ""}]')
    with pytest.raises(InputError, match="'role' occurs twice"):
        ask.read_conversation(str(file))
