"""Results kept on disk: read back as they were, and made anew where the file is damaged."""

import pytest

from vl3_jax import compilation_cache, private_files


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Makes functions that are kept in a folder of their own, and the list of their calls."""
    monkeypatch.setattr(compilation_cache, "default_folder", lambda: tmp_path)
    calls = []

    def make():
        @private_files.kept
        def double(number):
            calls.append(number)
            return {"double": 2 * number}

        return double

    return make, calls, tmp_path


def test_a_result_is_computed_once(counted):
    make, calls, _ = counted
    first = make()
    assert [first(3), first(3), make()(3), make()(4)] == [{"double": 6}] * 3 + [{"double": 8}]
    assert calls == [3, 4]


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"x" * 80])
def test_a_damaged_file_is_replaced(counted, damage):
    make, calls, folder = counted
    make()(3)
    (path,) = folder.rglob("*.pickle")
    path.write_bytes(damage(path.read_bytes()))
    assert make()(3) == make()(3) == {"double": 6}
    assert calls == [3, 3]


def test_a_folder_that_cannot_be_written_changes_nothing(counted):
    make, calls, folder = counted
    (folder / "shapes").write_bytes(b"")
    assert make()(3) == make()(3) == {"double": 6}
    assert calls == [3, 3]
