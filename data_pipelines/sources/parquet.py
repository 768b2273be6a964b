"""Reads Parquet files with embedded media: columns as the keys of records, media as bytes or {bytes, path}."""

import bisect
import collections
import functools
import itertools
from collections.abc import Callable
from typing import Any

from data_pipelines.sample_errors import BAD_RECORD, BadSampleError, one_line
from data_pipelines.sources.base import ByteFile, RecordSource
from vl3_jax.errors import InputError

_CACHED_GROUPS = 4  # row groups kept in memory, because neighbouring rows are often read together


class ParquetFile(RecordSource):
    """One Parquet file.

    Whole row groups are read at a time, so files with small groups (some hundred rows) suit random access.
    """

    KIND = "parquet"

    def __init__(self, path: str):
        super().__init__(path)
        metadata = self._open_file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._firsts = [0, *itertools.accumulate(sizes)]
        columns = collections.Counter(self._open_file.schema_arrow.names)
        twice = [name for name, count in columns.items() if count > 1]
        if twice:
            raise InputError(f"{path}: two columns are named {twice[0]!r}; rename one of them")
        if min(sizes, default=0) < 0 or sum(sizes) > ByteFile(path).size:  # a row has at least a byte
            raise InputError(f"{path}: states {sum(sizes):,} rows, more than it can hold; write the file again")

    def __len__(self) -> int:
        return self._firsts[-1]

    def where(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"

    def read(self, index: int) -> dict[str, Any]:
        group = bisect.bisect_right(self._firsts, index) - 1
        with self._lock:
            table = self._open_group(group)
        row = index - self._firsts[group]
        if isinstance(table, Exception) or row >= len(table):
            reason = one_line(table) if isinstance(table, Exception) else f"it has {len(table)} rows only"
            raise BadSampleError(BAD_RECORD, f"row group {group + 1} is damaged ({reason}); write the file again")
        return table.slice(row, 1).to_pylist()[0]

    @functools.cached_property
    def _open_group(self) -> Callable[[int], Any]:
        """Reads a row group; returns the error of a damaged one, so that it is not read again for each of its rows."""

        def read(group: int) -> Any:
            try:
                return self._open_file.read_row_group(group)
            except Exception as error:  # damage may raise anything
                return error

        return functools.lru_cache(_CACHED_GROUPS)(read)

    @functools.cached_property
    def _open_file(self):
        try:
            from pyarrow import parquet

            if "://" not in self.path:
                return parquet.ParquetFile(self.path)
            import fsspec

            return parquet.ParquetFile(fsspec.open(self.path, "rb").open())
        except ImportError as error:
            raise InputError(f"{self.path}: reading Parquet needs `pip install pyarrow`") from error
        except Exception as error:  # damage may raise anything
            raise InputError(f"{self.path}: not a readable Parquet file ({one_line(error)})") from error
