"""The synthetic tasks that the bundled model `nano` is trained for, over source images of the held-out split."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from data_pipelines.synthetic.image_pool import SPLITS, open_image_pool
from data_pipelines.synthetic.registry import EVALUATED_TASKS, STREAM, TASKS, TEXT, example, examples
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scenes import SyntheticVideo
from data_pipelines.synthetic.scoring import evaluate
from vl3_jax.config_tree import CHOICES, COUNT, LIMITS, SEED, CheckedSettings
from vl3_jax.evaluation.benchmark import CONSTANT, OVERALL, Benchmark, Item, PaperRow, Scoring, Verdict

FAMILY = "nano"
_MAX_NEW_TOKENS = 48  # the longest reference answers, boxes, have half as many
_STREAM_MAX_NEW_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class QuestionSelection(CheckedSettings):
    """Which questions of a synthetic task to ask.

    Attributes:
      count: Number of questions.
      seed: Random seed of the questions.
      split: Split of the source images.
      images: A file of source images to use instead of the split's own.
    """

    count: int = dataclasses.field(default=200, metadata={LIMITS: COUNT})
    seed: int = dataclasses.field(default=7, metadata={LIMITS: SEED})
    split: str = dataclasses.field(default="test", metadata={CHOICES: SPLITS})
    images: str | None = None


@dataclasses.dataclass(frozen=True)
class GeneratedMedium:
    """An image or video of a synthetic question, rendered when it is needed.

    Attributes:
      task: Name of the task, without its family.
      number: Number of the question.
      index: Number of the medium in its question.
      split, seed, images: As of `QuestionSelection`.
    """

    task: str
    number: int
    index: int
    split: str
    seed: int
    images: str | None

    def read(self) -> Any:
        """Returns the pixels, [H, W, 3] or [T, H, W, 3] uint8."""
        image_pool = open_image_pool(self.split, self.images)
        return example(self.task, self.split, self.seed, self.number, image_pool).media[self.index].pixels()


class SyntheticBenchmark(Benchmark):
    """One synthetic task, scored by its metric (`data_pipelines.synthetic.scoring`).

    Its questions come from a generator, so it needs no data. The answer to a live stream is the list of what was said
    after each frame, None for nothing.

    Attributes:
      metric: Name of its metric.
      has_media: Whether its questions have images or videos.
    """

    kind, size, needs_data = "synthetic", 0, False
    source, layout, licence = "generated", "", "none"

    def __init__(self, name: str, selection: QuestionSelection | None = None):
        """Creates the benchmark.

        Args:
          name: Name of the task, without its family.
          selection: Its questions; the default ones if None.
        """
        self._task = TASKS[name]
        self._selection = selection or QuestionSelection()
        self.name = self.title = f"{FAMILY}/{name}"
        self.rows = (PaperRow(self.name),)
        self.splits = (self._selection.split,)
        self.metric, self.has_media = self._task.metric, self._task.media != TEXT
        self.is_stream = self._task.media == STREAM
        self.max_new_tokens = _STREAM_MAX_NEW_TOKENS if self.is_stream else _MAX_NEW_TOKENS
        super().__init__()

    def items(self, data=None):
        chosen = self._selection
        samples = examples(self._task.name, chosen.split, chosen.seed, chosen.count, chosen.images)
        return [self._item(number, sample) for number, sample in enumerate(samples)]

    def _item(self, number: int, sample: Example) -> Item:
        chosen, media = self._selection, []
        for index, medium in enumerate(sample.media):
            source = GeneratedMedium(self._task.name, number, index, chosen.split, chosen.seed, chosen.images)
            if isinstance(medium, SyntheticVideo):
                media.append({"type": "video", "video": source, "timestamps": medium.times})
            else:
                media.append({"type": "image", "image": source})
        # The description of the media is not needed for scoring, and the seed and the number reproduce it.
        reference = {name: value for name, value in sample.reference.items() if name != "media"}
        target = reference["words"] if self.is_stream else reference["answer"]
        return Item(str(number), media, sample.question, reference | {"target": target})

    def verdict(self, response: Any, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        if self.is_stream != isinstance(response, list):
            raise TypeError("the answer to a stream, and to nothing else, is a list")
        return Verdict(evaluate(self._task.name, [response], [reference])["score"], response)

    def metrics(self, answers):
        silent: Any = [] if self.is_stream else ""
        said = [silent if answer.verdict.parsed is None else answer.verdict.parsed for answer in answers]
        values = evaluate(self._task.name, said, [answer.reference for answer in answers])
        first = {OVERALL: values.pop("score"), CONSTANT: values.pop("majority")}
        return {name: 100 * value for name, value in {**first, **values}.items() if name != "count"}

    def details(self, answers):
        return {}


SYNTHETIC = {f"{FAMILY}/{name}": functools.partial(SyntheticBenchmark, name) for name in EVALUATED_TASKS}
