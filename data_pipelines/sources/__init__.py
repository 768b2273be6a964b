"""Where records come from: every source is a sequence with random access, safe to use in threads and processes."""

from data_pipelines.sources.base import Record, RecordSource
from data_pipelines.sources.opening import KINDS, open_source

__all__ = ["KINDS", "Record", "RecordSource", "open_source"]
