"""MME: two yes-or-no questions about each picture."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import (
    ORIGINAL,
    OVERALL,
    Benchmark,
    Item,
    PaperRow,
    ScoredAnswer,
    Scoring,
    Verdict,
    grouped,
    mean,
    percent,
)
from vl3_jax.evaluation.scorers import yes_no

_PARTS = {
    "Perception": (
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
CATEGORIES = tuple(name for names in _PARTS.values() for name in names)
_RELEASE = "MME_Benchmark_release_version"
_YES_OR_NO = "Please answer yes or no."


class MME(Benchmark):
    """For each category 100 x accuracy + 100 x the share of pictures with both answers right; the sum of them all."""

    name, title, kind, size = "MME", "MME", "image", 2374
    rows = (PaperRow("MME"),)
    variants = (ORIGINAL,)
    source = "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation"
    layout = (
        "MME_Benchmark_release_version/{category}/ with X.jpg or X.png beside X.txt,\n"
        "or both in its images/ and questions_answers_YN/"
    )
    licence = "academic research only; pictures are given out on request"

    def items(self, data):
        items = []
        for category in data.groups(CATEGORIES, _RELEASE):
            for image, text in _pairs(pathlib.Path(data.path(_RELEASE, category))):
                for line in filter(str.strip, data.text(str(text)).splitlines()):
                    question, tab, answer = line.strip().partition("\t")
                    if not tab:
                        raise InputError(f"{text}: {line!r} has no tab before its answer; download the file again")
                    identifier = f"{category}{image.name}{answer}"
                    prompt = question.replace(f" {_YES_OR_NO}", "\nAnswer the question using a single word or phrase.")
                    reference = {"target": answer, "task_type": category, "image": f"{category}/{image.name}"}
                    media = [{"type": "image", "image": str(image)}]
                    items.append(Item(identifier, media, f"{prompt}\n{_YES_OR_NO}", reference))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        parsed = yes_no.at_start(response) if scoring.variant == ORIGINAL else yes_no.anywhere(response)
        unparsed = "neither yes nor no" if parsed == "other" else None
        return Verdict(float(parsed.lower() == str(reference["target"]).lower()), parsed, unparsed)

    def metrics(self, answers):
        points = {name: _points(group) for name, group in grouped(answers, "task_type").items()}
        sums = {part: sum(points.get(name, 0.0) for name in names) for part, names in _PARTS.items()}
        return points | sums | {OVERALL: sum(sums.values())}

    def details(self, answers):
        return {}


def _points(answers: Sequence[ScoredAnswer]) -> float:
    """Returns the points of a category; answers without a picture's name are taken two by two."""
    images: dict[Any, list[float]] = {}
    for number, answer in enumerate(answers):
        images.setdefault(answer.reference.get("image", number // 2), []).append(answer.score)
    return percent(answers) + 100 * mean([float(len(scores) > 1 and min(scores) == 1) for scores in images.values()])


def _pairs(category: pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Returns each picture of a category with its file of questions, sorted by name.

    Raises:
      InputError: The folder is missing, or a picture has no questions.
    """
    images = category / "images" if (category / "images").is_dir() else category
    texts = category / "questions_answers_YN" if (category / "questions_answers_YN").is_dir() else category
    if not images.is_dir():
        raise InputError(f"{category}: missing; `vl3 eval --check-data` lists what belongs where")
    pairs = []
    for text in sorted(texts.glob("*.txt")):
        found = [path for ending in ("jpg", "png", "jpeg") if (path := images / f"{text.stem}.{ending}").exists()]
        pairs.append((found[0] if found else images / f"{text.stem}.jpg", text.absolute()))
    return pairs
