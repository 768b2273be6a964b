"""Digests of files: by content, read again only where size or time differ."""

import os

from vl3_jax.storage.file_digests import FileDigests


def test_a_digest_follows_the_content_and_not_name_or_time(tmp_path):
    first, copy, stored = tmp_path / "a", tmp_path / "b", tmp_path / "folder" / "digests.json"
    first.write_bytes(b"x" * 300_000)
    digest = FileDigests(stored).digest(str(first))
    copy.write_bytes(first.read_bytes())
    os.utime(copy, (1, 1))
    assert FileDigests(stored).digest(str(copy)) == digest
    content = bytearray(first.read_bytes())
    content[150_000] ^= 1  # in the middle, at the same size
    first.write_bytes(content)
    os.utime(first, (2, 2))
    assert FileDigests(stored).digest(str(first)) != digest


def test_a_file_of_the_same_size_and_time_is_not_read(tmp_path):
    file, stored = tmp_path / "a", tmp_path / "digests.json"
    file.write_bytes(b"before")
    os.utime(file, (1, 1))
    digest = FileDigests(stored).digest(str(file))
    file.write_bytes(b"beyond")
    os.utime(file, (1, 1))
    assert FileDigests(stored).digest(str(file)) == digest
    stored.write_text("damaged")
    assert FileDigests(stored).digest(str(file)) != digest


def test_where_nothing_can_be_stored(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"content")
    assert FileDigests(file / "below").digest(str(file)) == FileDigests().digest(str(file))
