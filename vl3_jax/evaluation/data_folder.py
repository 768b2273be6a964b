"""The folder of one benchmark's data: reads annotation files of every format, and finds media."""

import csv
import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from data_pipelines.sample_errors import BadSampleError, one_line
from data_pipelines.sources.parquet import ParquetFile
from vl3_jax import json_file
from vl3_jax.errors import InputError

logger = logging.getLogger(__name__)

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
_MAX_BYTES = 2**30
_ADVICE = "`vl3 eval --check-data` lists what belongs where"


class DataFolder:
    """Reads files below a folder. Every method raises InputError, with the path, if a file is missing or malformed."""

    def __init__(self, root: str | pathlib.Path):
        self.root = pathlib.Path(root)

    def path(self, *parts: str) -> str:
        """Returns the path of a file or folder, whether it exists or not."""
        return str(self.root.joinpath(*parts))

    def exists(self, *parts: str) -> bool:
        """Returns whether a file or folder exists."""
        return self.root.joinpath(*parts).exists()

    def json(self, *parts: str) -> Any:
        """Returns the value of a JSON file."""
        return json_file.parse_json(self._read(*parts), self.path(*parts), _MAX_BYTES)

    def loose_json(self, *parts: str) -> Any:
        """As `json`, but bytes that are not UTF-8 are replaced."""
        return json_file.parse_json(self.text(*parts).encode(), self.path(*parts), _MAX_BYTES)

    def json_lines(self, *parts: str) -> list[dict[str, Any]]:
        """Returns the objects of a file of JSON lines."""
        rows = []
        for number, line in enumerate(self._read(*parts).splitlines(), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise InputError(f"{self.path(*parts)}, line {number}: not a JSON object; download the file again")
                rows.append(row)
        return rows

    def csv(self, *parts: str) -> list[dict[str, str]]:
        """Returns the rows of a CSV file with a header."""
        text = self._read(*parts).decode("utf-8-sig", "replace")
        return list(csv.DictReader(text.splitlines(keepends=True)))

    def table(self, *parts: str) -> list[dict[str, Any]]:
        """Returns the rows of a Parquet file, with a `StoredImage` for each image."""
        if not self.exists(*parts):
            raise self._missing(*parts)
        path = self.path(*parts)
        try:
            import pyarrow
            from pyarrow import parquet

            schema = parquet.read_schema(path)
            images = [field.name for field in schema if _holds_image(field.type)]
            columns = [f"{name}.path" if name in images else name for name in schema.names]
            rows = parquet.ParquetFile(path).read(columns=columns).to_pylist()
        except ImportError as error:
            raise InputError(f"{path}: reading Parquet needs `pip install pyarrow`") from error
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{path}: not a readable Parquet file ({one_line(error)}); download it again") from None
        for number, row in enumerate(rows):
            row |= {name: StoredImage(path, number, name) for name in images if row[name] is not None}
        return rows

    def split(self, split: str, *parts: str) -> list[dict[str, Any]]:
        """Returns the rows of a split of a data set folder: its Parquet files `split-*`, sorted.

        The files may lie in the folder itself or in `data`, as on the Hugging Face Hub.
        """
        folder = self.root.joinpath(*parts)
        files = [path for place in (folder, folder / "data") for path in sorted(place.glob(f"{split}-*.parquet"))]
        if not files:
            raise self._missing(*parts, f"{split}-00000-of-00001.parquet")
        return [row for path in files for row in self.table(str(path.relative_to(self.root)))]

    def groups(self, names: Sequence[str], *parts: str) -> list[str]:
        """Returns those of some folders that exist; all if none does. A warning names how many are left out."""
        existing = [name for name in names if self.exists(*parts, name)]
        left_out = [name for name in names if name not in existing]
        if existing and left_out:
            logger.warning("%s: no folder %s; %d are left out", self.path(*parts), left_out[0], len(left_out))
        return existing or list(names)

    def text(self, *parts: str) -> str:
        """Returns the text of a file; bytes that are not UTF-8 are replaced."""
        return self._read(*parts).decode("utf-8-sig", "replace")

    def content(self, *parts: str) -> bytes:
        """Returns the bytes of a file."""
        return self._read(*parts)

    def video(self, *parts: str, endings: tuple[str, ...] = VIDEO_ENDINGS[:4]) -> str:
        """Returns the path of a video given without its ending: the first that exists, else that of an mp4 file."""
        found = (self.path(*parts) + ending for ending in endings if self.root.joinpath(*parts[:-1]).exists())
        existing = [path for path in found if pathlib.Path(path).exists()]
        return existing[0] if existing else self.path(*parts) + ".mp4"

    def _read(self, *parts: str) -> bytes:
        try:
            return self.root.joinpath(*parts).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(*parts) from None
        except OSError as error:
            raise InputError(f"{self.path(*parts)}: cannot be read ({error.strerror or error}); check it") from None

    def _missing(self, *parts: str) -> InputError:
        return InputError(f"{self.path(*parts)}: missing; {_ADVICE}")


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image inside a Parquet file, read when it is needed.

    Attributes:
      file: Path of the file.
      row: Number of its row.
      column: Name of its column.
    """

    file: str
    row: int
    column: str

    def read(self) -> bytes | str:
        """Returns the content of the image, or the path that the file has instead.

        Raises:
          InputError: The file is damaged there.
        """
        try:
            cell = _open(self.file).read(self.row)[self.column]
        except BadSampleError as error:
            raise InputError(f"{self.file}, row {self.row + 1}: {error}") from None
        return cell.get("bytes") or cell["path"]


def read_medium(value: Any) -> Any:
    """Returns what the `read` of a value gives, as that of a `StoredImage`, and a value without one as it is."""
    return value.read() if hasattr(value, "read") else value


_open = functools.lru_cache(maxsize=4)(ParquetFile)


def _holds_image(kind: Any) -> bool:
    names = {kind.field(place).name for place in range(kind.num_fields)}
    return names == {"bytes", "path"}
