"""What a benchmark is: items with messages and references, the score of an answer, and the metrics of all answers.

A benchmark is a class of a module in `vl3_jax.evaluation.benchmarks`, which lists them by name.
"""

import abc
import collections
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from vl3_jax.errors import InputError
from vl3_jax.evaluation.data_folder import DataFolder, read_medium
from vl3_jax.evaluation.scorers.unparsed import UnparsedError
from vl3_jax.processing.mask_files import decode_rle
from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.sa2va.templates import region_request

logger = logging.getLogger(__name__)

OVERALL, MACRO, CONSTANT = "Overall", "Macro", "constant answer"
HARNESS, ORIGINAL, OFFLINE = "harness", "original", "offline"

# The times in seconds of the frames that the model sees of a video, given as a part of a message.
FrameTimes = Callable[[Mapping[str, Any]], Sequence[float]]
# Asks a judge: name of the prompt, values of its placeholders; returns the reply.
AskJudge = Callable[[str, Mapping[str, Any]], str]


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One question of a benchmark.

    Attributes:
      id: Identifier, unique within the benchmark.
      media: Parts of a message, images and videos by path, or by an object whose `read` gives them when they are
        needed, such as a `StoredImage`; a video may have `start` and `end` in seconds.
      text: The instruction. Where `compose` is set, what it makes instead of it depends on the media.
      reference: JSON values that the answer is scored against: "target", "task_type" and what the benchmark needs.
      compose: Makes the whole content of the user's turn, for benchmarks that interleave text and media or show
        subtitles; takes the times of the frames of a video.
      frames: Files of all frames of a video in which objects are drawn; its media are those that the model sees.
      mode: How that video is tracked; see `vl3_jax.inference.mask_drawer`.
      regions: Run lengths of the regions of its image that it is about; the text calls them region1, region2, ...
    """

    id: str
    media: Sequence[Mapping[str, Any]]
    text: str
    reference: Mapping[str, Any]
    compose: Callable[[FrameTimes], list[dict[str, Any]]] | None = None
    frames: Sequence[str] = ()
    mode: Literal["sa2va", "sa2va_i"] = "sa2va"
    regions: Sequence[Mapping[str, Any]] = ()

    def content(self, frame_times: FrameTimes) -> list[dict[str, Any]]:
        """Returns the parts of the user's turn: the media, then the instruction, unless the item composes them."""
        parts = self.compose(frame_times) if self.compose else [*self.media, {"type": "text", "text": self.text}]
        return [{key: read_medium(value) for key, value in part.items()} for part in parts]

    def messages(self, frame_times: FrameTimes) -> list[dict[str, Any] | Turn]:
        """Returns the conversation up to where the answer begins; there is no system prompt."""
        content = self.content(frame_times)
        if not self.regions:
            return [{"role": "user", "content": content}]
        media = [MediaPart(part["type"], part[part["type"]]) for part in content if part["type"] != "text"]
        return [Turn("user", [*media, *region_request([decode_rle(region) for region in self.regions], self.text)])]

    @property
    def media_key(self) -> tuple[Any, ...]:
        """Identifies the media: items with equal keys share decoded media."""
        return tuple((part["type"], part[part["type"]], part.get("start"), part.get("end")) for part in self.media)

    def missing_media(self) -> list[str]:
        """Returns the paths of media that do not exist."""
        paths = dict.fromkeys([*(part[part["type"]] for part in self.media), *self.frames])
        return [path for path in paths if isinstance(path, str) and not pathlib.Path(path).exists()]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How answers are scored.

    Attributes:
      official: Reproduce the official evaluation with its mistakes; otherwise they are corrected.
      variant: "harness", the rules of the official evaluation; "original", those of the benchmark's authors; "offline",
        rules that stand in for a judge. None is "offline" for a benchmark with a judge if there is none and the scoring
        is not official, else "harness".
      judge: Asks a judge; None for no judge.
    """

    official: bool = False
    variant: str | None = None
    judge: AskJudge | None = None

    def ask(self, name: str, **fields: Any) -> str:
        """Returns the reply of the judge, stripped; without a judge it is empty."""
        return "" if self.judge is None else self.judge(name, fields).strip()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The score of one answer.

    Attributes:
      score: From 0 to 1; official scoring of overlapping intervals can exceed 1.
      parsed: The answer that was read out of the response, a JSON value.
      unparsed: What the response lacks if no answer can be read out of it, else None.
      rating: The judge's rating from 0 to 5, in the one benchmark that has it.
    """

    score: float
    parsed: Any = None
    unparsed: str | None = None
    rating: float | None = None


@dataclasses.dataclass(frozen=True)
class ScoredAnswer:
    """A verdict with the reference that it belongs to."""

    verdict: Verdict
    reference: Mapping[str, Any]

    @property
    def score(self) -> float:
        return self.verdict.score


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """A row of the paper's tables, and where its value stands in the metrics.

    Attributes:
      name: Name of the row.
      path: Keys of the value in the metrics.
    """

    name: str
    path: tuple[str, ...] = (OVERALL,)


class Benchmark(abc.ABC):
    """A benchmark.

    Attributes:
      name: Name for `--tasks`, and that of its folder in the folder of all data.
      title: Name for people.
      kind: "image" or "video"; "synthetic" is asked with the checkpoint's own merge sizes.
      rows: Rows of the paper's tables.
      size: Usual number of items; 0 if there is none.
      needs_data: Whether the items come from a folder of data.
      is_stream: Whether the items are live streams, in which the model decides when to speak (see `live_streams`).
      draws: Whether answers are masks: objects of the form of `vl3_jax.evaluation.drawn_answers`.
      shows_regions: Whether questions are about regions of images.
      max_new_tokens: Tokens that an answer has at most; None for no limit of the benchmark's own.
      judge_prompts: Names of the judge's prompts it uses.
      variants: Variants of scoring that are reported beside the default one.
      source: Where the data is published.
      layout: Files and folders in the folder of the benchmark, a line each.
      licence: What its licence asks.
      splits: Splits of the data; the first is the default.
      submission: Whether a benchmark server takes the answers of a split whose references are hidden.
      split: The chosen split.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    kind: ClassVar[str]
    rows: ClassVar[tuple[PaperRow, ...]]
    size: ClassVar[int]
    source: ClassVar[str]
    layout: ClassVar[str]
    licence: ClassVar[str]
    needs_data: ClassVar[bool] = True
    is_stream: bool = False
    draws: ClassVar[bool] = False
    shows_regions: ClassVar[bool] = False
    max_new_tokens: int | None = None
    judge_prompts: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[tuple[str, ...]] = ("test",)
    submission: ClassVar[bool] = False

    def __init__(self, split: str | None = None):
        """Creates the benchmark.

        Args:
          split: One of `splits`; the first of them if None.

        Raises:
          InputError: There is no such split.
        """
        self.split = split or self.splits[0]
        if self.split not in self.splits:
            raise InputError(f"{self.name} has no split {self.split!r}; use {' or '.join(self.splits)}")

    @property
    def task(self) -> str:
        """The name for `--tasks`: that of the benchmark, and of its split if it is not the default one."""
        return self.name if self.split == self.splits[0] else f"{self.name}@{self.split}"

    @abc.abstractmethod
    def items(self, data: DataFolder) -> list[Item]:
        """Reads the items of the benchmark.

        Raises:
          InputError: An annotation file is missing or malformed; the message names it.
        """

    def load(self, root: str | pathlib.Path | None) -> list[Item]:
        """Reads the items from the folder with the name of the benchmark: `root`, or a folder below it.

        Items that share an id are kept: from the second on, `#2` and so on is appended, and a warning is logged.

        Raises:
          InputError: As `items`, or the benchmark needs data and `root` is None.
        """
        if root is None:
            if self.needs_data:
                raise InputError(
                    f"{self.name} needs its data; give the folder of all benchmarks (--data, in training eval.data)"
                )
            root = self.name
        data = DataFolder(root if pathlib.Path(root).name == self.name else pathlib.Path(root, self.name))
        try:
            items = self.items(data)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise InputError(
                f"{data.root}: an annotation of {self.name} lacks what it needs ({error!r}); download the files again"
            ) from None
        return _with_unique_ids(items, f"{data.root}: {self.name}")

    @abc.abstractmethod
    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        """Scores one answer; an UnparsedError says that none can be read."""

    def score(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        """Scores one answer; one that cannot be read scores 0."""
        try:
            return self.verdict(response, reference, self.effective(scoring))
        except UnparsedError as error:
            return Verdict(0.0, unparsed=error.reason)

    def effective(self, scoring: Scoring) -> Scoring:
        """Returns the scoring with its variant filled in."""
        if scoring.variant is not None:
            return scoring
        offline = bool(self.judge_prompts) and scoring.judge is None and not scoring.official
        return dataclasses.replace(scoring, variant=OFFLINE if offline else HARNESS)

    def metrics(self, answers: Sequence[ScoredAnswer]) -> dict[str, Any]:
        """Returns the metrics that the official evaluation reports; groups without an answer are left out."""
        return accuracies(answers)

    def details(self, answers: Sequence[ScoredAnswer]) -> dict[str, Any]:
        """Returns further metrics, among them the mean over the groups."""
        return macro_averages(self.metrics(answers))

    def submit(self, answers: Mapping[str, Any], items: Sequence[Item]) -> Any:
        """Returns what the benchmark's server takes, a JSON value or `SubmissionFiles`; None where there is none.

        Args:
          answers: Responses by the ids of their items: texts, or masks.
          items: The items.
        """
        return None


def _with_unique_ids(items: Sequence[Item], where: str) -> list[Item]:
    seen, unique = collections.Counter(), []
    for item in items:
        seen[item.id] += 1
        number = seen[item.id]
        unique.append(item if number == 1 else dataclasses.replace(item, id=f"{item.id}#{number}"))
    twice = [name for name, count in seen.items() if count > 1]
    if twice:
        logger.warning("%s: %d ids occur more than once, as %r; all items are kept", where, len(twice), twice[0])
    return unique


def accuracies(answers: Sequence[ScoredAnswer], key: str = "task_type") -> dict[str, Any]:
    """Returns the accuracy in percent of each group and over all answers, each of which counts once there.

    Args:
      answers: Scored answers.
      key: Key of the reference with the name of the group, or with a list of several.
    """
    groups = grouped(answers, key)
    return {name: percent(group) for name, group in groups.items()} | {OVERALL: percent(answers)}


def macro_averages(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the mean over the groups of accuracies, or of each set of groups."""
    sets = {name: macro_averages(value) for name, value in metrics.items() if isinstance(value, dict)}
    groups = [value for name, value in metrics.items() if name != OVERALL and isinstance(value, float)]
    return sets | ({MACRO: mean(groups)} if groups else {})


def grouped(answers: Iterable[ScoredAnswer], key: str) -> dict[str, list[ScoredAnswer]]:
    """Returns the answers by the value, or the values, of a key of their references."""
    groups = collections.defaultdict(list)
    for answer in answers:
        names = answer.reference.get(key)
        for name in names if isinstance(names, list) else [] if names is None else [names]:
            groups[str(name)].append(answer)
    return dict(groups)


def percent(answers: Sequence[ScoredAnswer]) -> float:
    """Returns the mean score in percent, 0 without answers."""
    return 100 * mean([answer.score for answer in answers])


def mean(values: Sequence[float]) -> float:
    """Returns the mean, 0 without values."""
    return sum(values) / len(values) if values else 0.0
