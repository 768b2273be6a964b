"""Submissions that are not JSON: the files that the server of a benchmark takes in one archive."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Iterator

from vl3_jax.storage.durable import rename


@dataclasses.dataclass(frozen=True)
class SubmissionFiles:
    """The files of a submission.

    Attributes:
      files: Yields the path inside the archive and the content of each, one after another.
    """

    files: Callable[[], Iterator[tuple[str, bytes]]]

    def write(self, path: pathlib.Path) -> None:
        """Writes the archive, whole or not at all; equal files give equal bytes.

        Args:
          path: A zip file in a folder that exists.

        Raises:
          OSError: It cannot be written.
        """
        partial = path.with_name(f"{path.name}.partial")
        try:
            with zipfile.ZipFile(partial, "w") as archive:
                for name, content in self.files():
                    archive.writestr(zipfile.ZipInfo(name), content)
            rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)
