"""Files are flushed before they get their names, and their folders after."""

import os
import pathlib

import pytest
from etils import epath

from vl3_jax.storage import durable, jobs


@pytest.fixture
def calls(monkeypatch):
    """The names that were flushed and renamed, in order."""
    found, fsync, replace = [], os.fsync, os.replace

    def observed_fsync(descriptor):
        found.append(("flush", pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def observed_replace(source, target):
        found.append(("rename", pathlib.Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", observed_fsync)
    monkeypatch.setattr(os, "replace", observed_replace)
    return found


def test_a_file(calls, tmp_path):
    for content in (b"one", b"two"):
        durable.atomic_write(epath.Path(tmp_path) / "a", content)
        assert (tmp_path / "a").read_bytes() == content
    assert calls[:3] == [("flush", "a.partial"), ("rename", "a"), ("flush", tmp_path.name)]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder(calls, tmp_path):
    (tmp_path / "new" / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (tmp_path / "new" / name).write_text(name)
    (tmp_path / "new" / "link").symlink_to("nowhere")
    durable.rename(tmp_path / "new", tmp_path / "name")
    assert sorted(calls[:4]) == [("flush", name) for name in ("a", "b", "inner", "new")]
    assert calls[4:] == [("rename", "name"), ("flush", tmp_path.name)]


def test_a_job(calls, tmp_path):
    with jobs.open_job(tmp_path / "out", "mine", {"a"}) as job:
        (job.folder / "a").write_text("content")
        job.mark_done(("a",))
        assert calls[-1] == ("flush", ".vl3_progress.jsonl")
        job.commit()
    assert ("flush", "a") in calls[: calls.index(("rename", "out"))]
