"""ArrayRecord shards written by `vl3 data write`: annotation and media of a sample in one record.

A record is: 4 bytes, the length of the header (little-endian); the header, the annotation as JSON, in which each
medium is {"path": its name, "at": [start, stop]}; then the bytes of the media, which `at` counts from.
"""

import functools
import json
import struct
from collections.abc import Mapping
from typing import Any

from data_pipelines.sample_errors import BAD_RECORD, BadSampleError, SampleError
from data_pipelines.sources.base import ByteFile, Record, RecordSource
from vl3_jax.errors import InputError

_LENGTH = struct.Struct("<I")
MEDIA_KEYS = ("image", "video")


def encode(fields: Mapping[str, Any]) -> bytes:
    """One record; media in `fields` are {"path": ..., "bytes": ...} or lists of these."""
    blobs, header = [], dict(fields)
    position = 0
    for key in MEDIA_KEYS:
        specs = []
        for medium in header.get(key) or []:
            specs.append({"path": medium["path"], "at": [position, position + len(medium["bytes"])]})
            blobs.append(medium["bytes"])
            position += len(medium["bytes"])
        if specs:
            header[key] = specs
    text = json.dumps(header, ensure_ascii=False).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *blobs])


def decode(record: bytes) -> dict[str, Any]:
    """The inverse of `encode`. ValueError when damaged."""
    (length,) = _LENGTH.unpack_from(record)
    begin = _LENGTH.size + length
    fields = json.loads(record[_LENGTH.size : begin].decode())
    for key in MEDIA_KEYS:
        for medium in fields.get(key) or []:
            start, stop = medium.pop("at")
            medium["bytes"] = record[begin + start : begin + stop]
            if len(medium["bytes"]) != stop - start:
                raise ValueError("cut off")
    return fields


class ArrayRecords(RecordSource):
    """One shard."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self._length = self._call("num_records")
        if not self._length:  # what the reader says of a damaged file, too
            raise InputError(f"{path}: no records in it, or not a whole ArrayRecord file; write or fetch it again")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record | SampleError:
        where = f"{self.path}, record {index + 1}"
        try:
            return Record(decode(self._call("read", [index])[0]), where)
        except (ValueError, KeyError, TypeError, struct.error, InputError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            return BadSampleError(BAD_RECORD, f"damaged ({text}); write the shard anew").at(where)

    def fingerprint(self) -> list:
        """See `Source.stamp`."""
        return ["array_record", len(self), *ByteFile(self.path).fingerprint()]

    def _call(self, method: str, *arguments):
        try:
            with self._lock:  # the reader itself is not said to be thread-safe
                return getattr(self._open_reader, method)(*arguments)
        except (RuntimeError, ValueError, IndexError) as error:
            text = " ".join(str(error).split())
            raise InputError(f"{self.path}: not an ArrayRecord file that can be read ({text})") from error

    @functools.cached_property
    def _open_reader(self):
        from array_record.python import array_record_module

        return array_record_module.ArrayRecordReader(self.path)
