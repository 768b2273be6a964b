"""Errors of single samples, counted by kind and by file; too many of them stop a job."""

import collections
import dataclasses
import json
from collections.abc import Iterable

from vl3_jax.errors import InputError, printable

NOT_JSON = "not JSON"
NOT_UTF8 = "not UTF-8"
BAD_RECORD = "bad record"
EMPTY = "empty conversation"
TAGS = "tags and media differ"
MISSING = "missing file"
OUTSIDE = "outside the media folder"
UNREADABLE = "unreadable media"
TOO_LONG = "too long"
CHANGED = "changed since indexed"
FAILED = "failed"  # an unexpected exception; the message holds its type and text

_MAX_CHARACTERS = 400  # of a text that a bad sample brings into an error or a report
_MAX_EXAMPLES = 3  # listed per kind
_MAX_FILES = 5  # listed


@dataclasses.dataclass(frozen=True)
class SampleError:
    """Why a sample is skipped.

    Attributes:
      kind: One of the kinds above.
      where: Annotation file and line, or shard and sample.
      message: One line: what is wrong and what to do.
      file: The file at fault, a medium or the annotation file.
    """

    kind: str
    where: str
    message: str
    file: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}: {self.message}"


class BadSampleError(Exception):
    """Raised where a fault is detected; becomes a `SampleError` where the sample's location is known."""

    def __init__(self, kind: str, message: str, file: str = ""):
        super().__init__(message)
        self.kind, self.message, self.file = kind, message, file

    def at(self, where: str) -> SampleError:
        """Returns the error of the sample at `where`, its annotation file and line."""
        file = self.file or where.split(", ")[0]
        return SampleError(self.kind, *(readable(text) for text in (where, self.message, file)))


def from_exception(error: Exception, where: str) -> SampleError:
    """Converts any exception that a sample raised into the error of that sample."""
    if isinstance(error, BadSampleError):
        return error.at(where)
    text = one_line(error)
    if isinstance(error, InputError):
        return BadSampleError(UNREADABLE, text, text.split(": ")[0]).at(where)
    return BadSampleError(FAILED, f"{type(error).__name__}: {text}").at(where)


def readable(text: str) -> str:
    """Returns a text of a record or an error as a report shows it; see `printable`."""
    return printable(text, _MAX_CHARACTERS)


def one_line(error: Exception) -> str:
    """Returns the message of an exception in one line; the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class TooManyBadSamplesError(InputError):
    """The share of bad samples exceeds the allowed one. `table` lists the kinds of errors and the worst files."""

    def __init__(self, message: str, table: str):
        super().__init__(message)
        self.table = table


class SampleErrorLog:
    """Counts the samples seen and their errors."""

    def __init__(self):
        self.seen = 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.files: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[SampleError]] = {}

    @property
    def bad(self) -> int:
        return self.kinds.total()

    def add(self, errors: Iterable[SampleError], seen: int) -> None:
        """Adds `seen` samples, of which those with `errors` are bad."""
        self.seen += seen
        for error in errors:
            self.kinds[error.kind] += 1
            self.files[error.file] += 1
            examples = self.examples.setdefault(error.kind, [])
            if len(examples) < _MAX_EXAMPLES:
                examples.append(error)

    def table(self) -> str:
        """Returns several lines: kinds with counts and examples, then the files with most errors."""
        if not self.bad:
            return f"no problems in {self.seen:,} samples"
        lines = [f"{self.bad:,} of {self.seen:,} samples are bad ({self.bad / max(self.seen, 1):.1%})"]
        for kind, count in self.kinds.most_common():
            lines.append(f"{count:>9,}  {kind}")
            lines += [f"{'':11}{error.where}: {error.message}" for error in self.examples[kind]]
        lines.append("worst files:")
        lines += [f"{count:>9,}  {file}" for file, count in self.files.most_common(_MAX_FILES)]
        return "\n".join(lines)

    def check(self, share: float, at_least: int, bad: int | None = None, seen: int | None = None) -> None:
        """Checks the share of bad samples once enough samples have been seen.

        Args:
          share: Allowed share of bad samples, 0..1.
          at_least: With fewer samples seen, nothing is checked.
          bad: Number of bad samples on all hosts; by default that of this log.
          seen: Number of samples on all hosts; by default that of this log.

        Raises:
          TooManyBadSamplesError: More than `share` of the samples are bad.
        """
        bad, seen = self.bad if bad is None else bad, self.seen if seen is None else seen
        if seen >= at_least and bad > share * seen:
            raise TooManyBadSamplesError(
                f"{bad:,} of {seen:,} samples are bad, more than the {share:.1%} allowed; "
                f"repair the data (`vl3 data check` lists every problem) or raise the allowed share",
                self.table(),
            )


def to_json_lines(errors: Iterable[SampleError]) -> str:
    """Serialises errors to one line of JSON each."""
    return "".join(json.dumps(dataclasses.asdict(error), ensure_ascii=False) + "\n" for error in errors)


def from_json_lines(lines: str) -> list[SampleError]:
    """Parses the output of `to_json_lines`."""
    return [SampleError(**json.loads(line)) for line in lines.split("\n") if line]
