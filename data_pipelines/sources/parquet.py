"""Reads Parquet files with embedded media: columns as in the official records, media as bytes or {bytes, path}."""

import bisect
import functools
import itertools
from collections.abc import Callable
from typing import Any

from data_pipelines.sample_errors import one_line
from data_pipelines.sources.base import RecordSource
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

    def __len__(self) -> int:
        return self._firsts[-1]

    def where(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"

    def read(self, index: int) -> dict[str, Any]:
        group = bisect.bisect_right(self._firsts, index) - 1
        with self._lock:
            table = self._open_group(group)
        return table.slice(index - self._firsts[group], 1).to_pylist()[0]

    @functools.cached_property
    def _open_group(self) -> Callable[[int], Any]:
        return functools.lru_cache(_CACHED_GROUPS)(self._open_file.read_row_group)

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
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: not a readable Parquet file ({one_line(error)})") from error
