"""What was wrong with a sample, counted by kind and by file; too much of it stops a job."""

import collections
import dataclasses
import json
from collections.abc import Iterable

from vl3_jax.errors import InputError

NOT_JSON = "not JSON"
NOT_UTF8 = "not UTF-8"
BAD_RECORD = "bad record"
EMPTY = "empty conversation"
TAGS = "tags and media differ"
MISSING = "missing file"
UNREADABLE = "unreadable media"
TOO_LONG = "too long"
CHANGED = "changed since indexed"
FAILED = "failed"  # an exception nobody foresaw; its text names it

_EXAMPLES = 3  # shown of each kind
_WORST = 5  # files shown


@dataclasses.dataclass(frozen=True)
class SampleError:
    """Why a sample is skipped.

    Attributes:
      kind: one of the names above.
      where: annotation file and line (or shard and sample).
      message: one line: what is wrong and what to do.
      file: the file at fault, a medium or the annotation file.
    """

    kind: str
    where: str
    message: str
    file: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}: {self.message}"


class BadSampleError(Exception):
    """Carries kind and message from where a fault is found to where the sample's place is known."""

    def __init__(self, kind: str, message: str, file: str = ""):
        super().__init__(message)
        self.kind, self.message, self.file = kind, message, file

    def at(self, where: str) -> SampleError:
        """The problem, now that its place is known."""
        return SampleError(self.kind, where, self.message, self.file or where.split(", ")[0])


def from_exception(error: Exception, where: str) -> SampleError:
    """Any exception that one sample raised, as a problem of that sample."""
    if isinstance(error, BadSampleError):
        return error.at(where)
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return BadSampleError(UNREADABLE, text, text.split(": ")[0]).at(where)
    return BadSampleError(FAILED, f"{type(error).__name__}: {text}").at(where)


class TooManyBadSamplesError(InputError):
    """More of the data is bad than the job was told to bear. `table` has a line for each kind and the worst files."""

    def __init__(self, message: str, table: str):
        super().__init__(message)
        self.table = table


class SampleErrorLog:
    """Counts problems among the samples seen."""

    def __init__(self):
        self.seen = 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.files: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[SampleError]] = {}

    @property
    def bad(self) -> int:
        return self.kinds.total()

    def add(self, problems: Iterable[SampleError], seen: int) -> None:
        """`seen` samples went by, these problems among them."""
        self.seen += seen
        for problem in problems:
            self.kinds[problem.kind] += 1
            self.files[problem.file] += 1
            examples = self.examples.setdefault(problem.kind, [])
            if len(examples) < _EXAMPLES:
                examples.append(problem)

    def table(self) -> str:
        """Kinds with counts and examples, then the files with most problems; several lines."""
        if not self.bad:
            return f"no problems in {self.seen:,} samples"
        lines = [f"{self.bad:,} of {self.seen:,} samples are bad ({self.bad / max(self.seen, 1):.1%})"]
        for kind, count in self.kinds.most_common():
            lines.append(f"{count:>9,}  {kind}")
            lines += [f"{'':11}{problem.where}: {problem.message}" for problem in self.examples[kind]]
        lines.append("worst files:")
        lines += [f"{count:>9,}  {file}" for file, count in self.files.most_common(_WORST)]
        return "\n".join(lines)

    def check(self, share: float, at_least: int, bad: int | None = None, seen: int | None = None) -> None:
        """Raises TooManyBadSamplesError when more than `share` of at least `at_least` samples are bad.

        Args:
          share: 0..1.
          at_least: with fewer samples seen nothing is decided.
          bad: of all hosts; this log's own if not given.
          seen: of all hosts; likewise.
        """
        bad, seen = self.bad if bad is None else bad, self.seen if seen is None else seen
        if seen >= at_least and bad > share * seen:
            raise TooManyBadSamplesError(
                f"{bad:,} of {seen:,} samples are bad, more than the {share:.1%} allowed; "
                f"mend the data (`vl3 data check` lists every problem) or raise the allowed share",
                self.table(),
            )


def to_json(problem: SampleError) -> str:
    """One line."""
    return json.dumps(dataclasses.asdict(problem), ensure_ascii=False)


def from_json(line: str) -> SampleError:
    """The inverse of `to_json`."""
    return SampleError(**json.loads(line))
