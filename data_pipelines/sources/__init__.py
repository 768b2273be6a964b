"""Sources of records: sequences with random access that are safe to use from threads and processes."""

from data_pipelines.sources.base import Record, RecordSource, map_record
from data_pipelines.sources.opening import KINDS, open_source

__all__ = ["KINDS", "Record", "RecordSource", "map_record", "open_source"]
