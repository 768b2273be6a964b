"""Reads ArrayRecord shards written by `vl3 data write`: annotation and media of a sample in one record.

A record consists of: the length of the header in 4 bytes (little-endian); the header, which is the annotation as JSON
with each medium as {"path": its name, "at": [start, stop]}; and the bytes of the media, to which `at` refers.
"""

import functools
import json
import struct
from collections.abc import Mapping
from typing import Any

from data_pipelines.layouts import TAG_OF
from data_pipelines.sample_errors import BAD_RECORD, BadSampleError, one_line
from data_pipelines.sources.base import RecordSource
from vl3_jax.errors import InputError

_LENGTH = struct.Struct("<I")


def encode(fields: Mapping[str, Any]) -> bytes:
    """Encodes a record.

    Args:
      fields: The annotation, in which the media fields are lists of {"path": ..., "bytes": ...}; other keys of a medium
        are kept.
    """
    header, content = dict(fields), bytearray()
    for key in TAG_OF:
        entries = []
        for medium in header.get(key) or []:
            start = len(content)
            content += medium["bytes"]
            options = {name: value for name, value in medium.items() if name != "bytes"}
            entries.append({**options, "at": [start, len(content)]})
        if entries:
            header[key] = entries
    text = json.dumps(header, ensure_ascii=False).encode()
    return _LENGTH.pack(len(text)) + text + content


def decode(record: bytes) -> dict[str, Any]:
    """Decodes a record written by `encode`.

    Raises:
      ValueError: The record is damaged.
    """
    (length,) = _LENGTH.unpack_from(record)
    media_start = _LENGTH.size + length
    fields = json.loads(record[_LENGTH.size : media_start].decode())
    for key in TAG_OF:
        for medium in fields.get(key) or []:
            start, stop = medium.pop("at")
            medium["bytes"] = record[media_start + start : media_start + stop]
            if len(medium["bytes"]) != stop - start:
                raise ValueError("cut off")
    return fields


class ArrayRecords(RecordSource):
    """One ArrayRecord shard."""

    KIND = "array_record"

    def __init__(self, path: str):
        super().__init__(path)
        self._length = self._call("num_records")
        if not self._length:  # the reader reports 0 records for a damaged file, too
            raise InputError(f"{path}: no records, or not a complete ArrayRecord file; write or download it again")

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> dict[str, Any]:
        try:
            return decode(self._call("read", [index])[0])
        except Exception as error:  # the reader and the header of a damaged shard raise anything
            raise BadSampleError(BAD_RECORD, f"damaged ({one_line(error)}); write the shard again") from error

    def _call(self, method: str, *arguments):
        try:
            with self._lock:  # the reader is not documented as thread-safe
                return getattr(self._open_reader, method)(*arguments)
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"{self.path}: not a readable ArrayRecord file ({one_line(error)})") from error

    @functools.cached_property
    def _open_reader(self):
        from array_record.python import array_record_module

        return array_record_module.ArrayRecordReader(self.path)
