"""A journal keeps what was appended, whatever happened to the process that did so."""

import multiprocessing

import pytest

from vl3_jax.errors import InputError
from vl3_jax.storage.journal import Journal, LineLog, read_lines, whole_lines


def entry(line: dict) -> int:
    return line["value"]


def append(path, start: int) -> None:
    journal = Journal(path, entry, "not a value")
    for value in range(start, start + 200):
        journal.append({"value": value, "padding": "é" * 3000})
    journal.close()


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "journal.jsonl"
    for torn in (b"{", '{"value": "é'.encode()[:-1], b'{"value": 9}'):
        path.write_bytes(b'{"value": 1}\n{"value": 2}\n' + torn)
        journal = Journal(path, entry, "not a value")
        assert journal.entries == [1, 2]
        journal.append({"value": 3})
        journal.close()
        assert read_lines(path, entry, "not a value") == [1, 2, 3]


def test_a_refused_line_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    for line in (b"{", b"[]", b'{"other": 1}', b"\xff"):
        path.write_bytes(b'{"value": 1}\n' + line + b"\n")
        with pytest.raises(InputError, match=r"journal.jsonl, line 2: not a value"):
            Journal(path, entry, "not a value")


def test_entries_belong_to_a_fingerprint(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = Journal(path, entry, "not a value", fingerprint="a")
    assert (first.empty, first.resumed) == (True, False)
    first.restart()
    first.append({"value": 1})
    first.close()
    again = Journal(path, entry, "not a value", fingerprint="a")
    assert (again.resumed, again.entries) == (True, [1])
    again.close()
    other = Journal(path, entry, "not a value", fingerprint="b")
    assert (other.empty, other.resumed, other.entries) == (False, False, [])
    other.restart()
    other.close()
    assert path.read_text() == "b\n"


def test_several_processes_append(tmp_path):
    path = tmp_path / "journal.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append, args=(path, start)) for start in (0, 1000, 2000)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        Journal(path, entry, "not a value").close()  # opens and repairs the file meanwhile
    assert [process.exitcode for process in processes] == [0, 0, 0]
    values = read_lines(path, entry, "not a value")
    assert sorted(values) == [start + number for start in (0, 1000, 2000) for number in range(200)]


def test_a_log_is_repaired_from_its_end_and_read_line_by_line(tmp_path):
    path = tmp_path / "log.jsonl"
    for torn in ("", "x", "x" * 200_000):
        path.write_bytes(b'{"value": 1}\n' + torn.encode())
        assert list(whole_lines(path)) == [(1, b'{"value": 1}\n')]
        log = LineLog(path, flush_seconds=60)
        log.append({"value": 2})
        assert [line for _, line in whole_lines(path)] == [b'{"value": 1}\n', b'{"value": 2}\n']
        log.close()
    path.write_bytes(b"x" * 70_000)  # a line that never ended
    log = LineLog(path)
    assert (log.empty, path.stat().st_size) == (False, 0)
    log.close()
