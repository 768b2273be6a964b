"""Parts of a job, each of which one process does and writes to a file of its own."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from vl3_jax.errors import InputError

_SHARD = re.compile(r"(\d+)/(\d+)")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a job.

    Attributes:
      number: Number of the part, from 1.
      count: Number of parts.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Returns the shard of a text such as `2/4`.

        Raises:
          InputError: It is none.
        """
        found = _SHARD.fullmatch(text)
        shard = cls(*map(int, found.groups())) if found else cls(0)
        if not 1 <= shard.number <= shard.count:
            raise InputError(f"--shard {text}: give I/N, the part I of N, from 1/N to N/N")
        return shard

    def of(self, groups: Sequence[Any]) -> Sequence[Any]:
        """Returns every `count`-th of some groups."""
        return groups[self.number - 1 :: self.count]

    def file(self, whole: pathlib.Path) -> pathlib.Path:
        """Returns the file of this part, `answers-2-of-4.jsonl` of `answers.jsonl`; with one part it is the whole."""
        if self.count == 1:
            return whole
        return whole.with_name(f"{whole.stem}-{self.number}-of-{self.count}{whole.suffix}")


def shard_of(file: pathlib.Path, whole: pathlib.Path) -> Shard | None:
    """Returns the part of which a file is, or None if it is no part of `whole`."""
    if file.name == whole.name:
        return Shard()
    name = re.fullmatch(rf"{re.escape(whole.stem)}-(\d+)-of-(\d+){re.escape(whole.suffix)}", file.name)
    return Shard(*map(int, name.groups())) if name else None


def shard_files(whole: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of all parts that there are, of any number of parts, the whole one first."""
    if not whole.parent.is_dir():
        return []
    found = [file for file in whole.parent.iterdir() if shard_of(file, whole) is not None]
    return sorted(found, key=lambda file: (file.name != whole.name, file.name))
