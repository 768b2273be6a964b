"""Resumable downloads: a file that broke off goes on from its last byte, in the same run or in a later one."""

import hashlib
import http.client
import os
import pathlib
import re
import time
import urllib.error
import urllib.request

_CHUNK_BYTES = 2**20
_ATTEMPTS = 5  # without a single byte of progress
_TIMEOUT = 30.0  # seconds without an answer


class BrokenDownload(Exception):
    """A transfer that stopped; what arrived is kept for the next run."""


def download_file(url: str, target: pathlib.Path, size: int, etag: str | None, headers: dict[str, str], bar) -> None:
    """Fetches `url` to `target` by way of `target.partial`.

    Args:
      url: where the bytes are.
      target: the file to make; an existing one is left alone.
      size: its length in bytes.
      etag: its SHA-256 where the server gives that (files in large-file storage); checked after a resumed transfer.
      headers: sent along.
      bar: progress bar, advanced by the bytes that arrive.

    Raises:
      BrokenDownload: the connection failed again and again.
      OSError: the disk is full or not writable.
    """
    if target.exists():
        bar.update(size)
        return
    partial = target.with_name(target.name + ".partial")
    begun = partial.stat().st_size if partial.exists() else 0
    if begun > size:
        partial.unlink()
        begun = 0
    bar.update(begun)
    resumed, failures = begun > 0, 0
    while (before := partial.stat().st_size if partial.exists() else 0) < size:
        try:
            _transfer(url, partial, before, headers, bar)
        except (http.client.HTTPException, urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404):
                raise BrokenDownload(f"HTTP {error.code} for {target.name}") from error
            after = partial.stat().st_size if partial.exists() else 0
            failures = 0 if after > before else failures + 1
            if failures == _ATTEMPTS:
                reason = getattr(error, "reason", None) or error
                raise BrokenDownload(f"{target.name} at {after} of {size} bytes: {reason}") from error
            time.sleep(0.1 * 2**failures)
            resumed |= after > 0
    if not partial.exists():
        partial.touch()
    if resumed and re.fullmatch(r"[0-9a-f]{64}", etag or "") and _sha256(partial) != etag:
        partial.unlink()
        raise BrokenDownload(f"{target.name} arrived damaged and was removed")
    os.replace(partial, target)


def _transfer(url: str, partial: pathlib.Path, begin: int, headers: dict[str, str], bar) -> None:
    if begin:
        headers = {**headers, "Range": f"bytes={begin}-"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as answer:
        if begin and answer.status != 206:  # the server knows no ranges and begins anew
            bar.update(-begin)
            begin = 0
        with open(partial, "ab" if begin else "wb") as file:
            # `read1` hands over what has arrived, so that a broken connection loses none of it.
            while chunk := answer.read1(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
            expected = int(answer.headers.get("Content-Length") or 0)
            if file.tell() - begin < expected:
                raise http.client.IncompleteRead(b"", expected - (file.tell() - begin))


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
