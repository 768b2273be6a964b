"""Full disks: errors of all libraries about them, as one line."""

import errno
import json
import shutil

import numpy as np
import pytest

from support.full_disk import files_of_at_most
from vl3_jax.errors import InputError
from vl3_jax.storage.disk_space import check_space, is_full_disk, translate_full_disk, translate_write_errors
from vl3_jax.storage.journal import Journal


def nested(error):
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("a save failed") from cause
    except RuntimeError as outer:
        return outer


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EFBIG, "File too large"),
    OSError("1024 requested and 0 written"),
    ValueError('RESOURCE_EXHAUSTED: Error writing "a": Failed writing [OS error 28: ENOSPC No space left on device]'),
]


@pytest.mark.parametrize("error", [*FULL, *map(nested, FULL), ExceptionGroup("several", [ValueError(), FULL[0]])])
@pytest.mark.parametrize("translate", [translate_full_disk, translate_write_errors])
def test_a_full_disk_is_one_line(error, translate, tmp_path):
    line = r"out/a: no space left .* are free there now\); free some"
    with pytest.raises(InputError, match=line) as raised, translate(tmp_path / "out" / "a"):
        raise error
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "no file"), ValueError("3 requested"), InputError("mine")])
def test_other_errors_pass(error, tmp_path):
    assert not is_full_disk(error)
    with pytest.raises(type(error)) as raised, translate_full_disk(tmp_path):
        raise error
    assert raised.value is error


def test_space_is_compared_with_what_is_needed(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    check_space(tmp_path / "no" / "folder", 2000)
    check_space("gs://bucket/folder", 10**18)
    line = r"no/folder: no space left: 2\.50 kB are needed for plans and 2\.00 kB are free; free some space, or wait,"
    with pytest.raises(InputError, match=line):
        check_space(tmp_path / "no" / "folder", 2500, "plans", "or wait")


def test_a_journal_goes_on_where_a_full_disk_stopped_it(tmp_path):
    path = tmp_path / "log.jsonl"
    journal = Journal(path, lambda value: value, "no line")
    journal.append("a" * 50)
    journal.append("b" * 90)
    with files_of_at_most(200), pytest.raises(InputError, match=r"log\.jsonl: no space left"):
        journal.append("b" * 90)
    with files_of_at_most(200), pytest.raises(InputError):
        journal.close()
    again = Journal(path, lambda value: value, "no line")
    assert again.entries[:2] == ["a" * 50, "b" * 90]
    again.append("c")
    again.close()
    assert json.loads(path.read_text().splitlines()[-1]) == "c"


def test_numpy_on_a_full_disk(tmp_path):
    with files_of_at_most(1000), pytest.raises(InputError, match="no space left"), translate_full_disk(tmp_path):
        np.save(tmp_path / "a.npy", np.zeros(10_000))
