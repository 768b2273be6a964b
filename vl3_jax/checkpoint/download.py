"""Resumable downloads: an interrupted transfer continues from its last byte, in the same run or in a later one."""

import hashlib
import http.client
import os
import pathlib
import re
import time
import urllib.error
import urllib.request

_CHUNK_BYTES = 2**20
_MAX_FAILURES = 5  # consecutive attempts without a single byte of progress
_TIMEOUT = 30.0  # seconds without a response


class BrokenDownload(Exception):
    """A transfer stopped; the received bytes are kept for the next run."""


def download_file(url: str, target: pathlib.Path, size: int, etag: str | None, headers: dict[str, str], bar) -> None:
    """Downloads `url` to `target`, using `<target>.partial` while the transfer is incomplete.

    Args:
      url: Address of the file.
      target: Path of the file to write. An existing file is left unchanged.
      size: Length of the file in bytes.
      etag: ETag of the file. Where it is a SHA-256 (files in large-file storage), a resumed transfer is checked
        against it.
      headers: HTTP headers of the request.
      bar: Progress bar, advanced by the number of bytes received.

    Raises:
      BrokenDownload: The server refused the request, or the connection failed repeatedly without progress.
      OSError: The disk is full or not writable.
    """
    if target.exists():
        bar.update(size)
        return
    partial = target.with_name(target.name + ".partial")
    received = partial.stat().st_size if partial.exists() else 0
    if received > size:
        partial.unlink()
        received = 0
    bar.update(received)
    resumed, failures = received > 0, 0
    while (before := partial.stat().st_size if partial.exists() else 0) < size:
        try:
            _transfer(url, partial, before, headers, bar)
        except (http.client.HTTPException, urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404):
                raise BrokenDownload(f"HTTP {error.code} for {target.name}") from error
            after = partial.stat().st_size if partial.exists() else 0
            failures = 0 if after > before else failures + 1
            if failures == _MAX_FAILURES:
                reason = getattr(error, "reason", None) or error
                raise BrokenDownload(f"{target.name} at {after} of {size} bytes: {reason}") from error
            time.sleep(0.1 * 2**failures)
            resumed |= after > 0
    if not partial.exists():
        partial.touch()
    if resumed and re.fullmatch(r"[0-9a-f]{64}", etag or "") and _sha256(partial) != etag:
        partial.unlink()
        raise BrokenDownload(f"{target.name} does not match its SHA-256 and was removed")
    os.replace(partial, target)


def _transfer(url: str, partial: pathlib.Path, start: int, headers: dict[str, str], bar) -> None:
    if start:
        headers = {**headers, "Range": f"bytes={start}-"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
        if start and response.status != 206:  # the server ignores ranges and sends the file from its first byte
            bar.update(-start)
            start = 0
        with open(partial, "ab" if start else "wb") as file:
            # `read1` returns what has been received, so that a broken connection loses none of it.
            while chunk := response.read1(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
            expected = int(response.headers.get("Content-Length") or 0)
            if file.tell() - start < expected:
                raise http.client.IncompleteRead(b"", expected - (file.tell() - start))


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
