"""MMMU: college problems of 30 subjects, with pictures between the words."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import (
    HARNESS,
    ORIGINAL,
    Benchmark,
    Item,
    PaperRow,
    Scoring,
    Verdict,
    percent,
)
from vl3_jax.evaluation.scorers.choice_candidates import parse_choice
from vl3_jax.evaluation.scorers.letters import letters_of
from vl3_jax.evaluation.scorers.open_answers import open_matches, parse_open

_DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine"),
        *("Pharmacy", "Public_Health"),
    ),
    "Humanities and Social Science": ("History", "Literature", "Psychology", "Sociology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics"),
        *("Energy_and_Power", "Materials", "Mechanical_Engineering"),
    ),
}
SUBJECTS = tuple(sorted(subject for subjects in _DOMAINS.values() for subject in subjects))
_ASK_OPEN = "Answer the question using a single word or phrase."
_ASK_CHOICE = "Answer with the option's letter from the given choices directly."
_TAG = re.compile(r"<image (\d+)>")


class MMMU(Benchmark):
    """Accuracy of letters, and of key phrases and numbers for open questions."""

    name, title, kind, size = "MMMU", "MMMU (val)", "image", 900
    rows = (PaperRow("MMMU val"),)
    variants = (ORIGINAL,)
    source = "huggingface.co/datasets/MMMU/MMMU"
    layout = "{subject}/validation-*.parquet for each of the 30 subjects"
    licence = "Apache-2.0; the pictures come from the web and from textbooks, research use"

    def items(self, data):
        items = []
        for subject in data.groups(SUBJECTS):
            for row in data.split("validation", subject):
                if "validation" in row["id"]:
                    options, is_open = parse_options(row["options"]), row["question_type"] == "open"
                    asked = _ASK_OPEN if is_open else f"{option_lines(options)}\n{_ASK_CHOICE}"
                    text = f"{row['question']}\n\n{asked}"
                    reference = {"target": row["answer"], "task_type": subject, "options": options}
                    reference["question_type"] = row["question_type"]
                    items.append(interleaved_item(row, text, reference))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        target, original = reference["target"], scoring.variant == ORIGINAL
        if reference.get("question_type") == "open":
            if scoring.official and scoring.variant == HARNESS:
                return Verdict(float(response.strip() == target), response.strip())
            parsed = parse_open(response)
            return Verdict(float(open_matches(parsed, target)), list(map(str, parsed)))
        letter = parse_choice(response, reference.get("options") or [], boxed=not original)
        return Verdict(float(letter == target), letter)

    def details(self, answers):
        groups = {
            domain: [answer for answer in answers if answer.reference.get("task_type") in subjects]
            for domain, subjects in _DOMAINS.items()
        }
        return super().details(answers) | {name: percent(group) for name, group in groups.items() if group}


def parse_options(options: Any) -> list[str]:
    """Returns the options of a data set's cell, which holds a Python list as text.

    Raises:
      InputError: It is no list.
    """
    try:
        parsed = ast.literal_eval(options) if isinstance(options, str) else options
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        parsed = None
    if not isinstance(parsed, list):
        raise InputError(f"options {options!r}: not a list; download the data set again")
    return [str(option) for option in parsed]


def option_lines(options: Sequence[str]) -> str:
    """Returns the options as lines of the form `(A):text`."""
    return "".join(f"({letter}):{option}\n" for letter, option in zip(letters_of(len(options)), options, strict=True))


def interleaved_item(row: Mapping[str, Any], text: str, reference: Mapping[str, Any]) -> Item:
    """Returns an item whose images stand in the text, each behind its tag `<image k>`.

    Raises:
      InputError: A tag has no image.
    """
    media, parts, end = [], [], 0
    for tag in _TAG.finditer(text):
        image = row.get(f"image_{tag.group(1)}")
        if image is None:
            raise InputError(f"{row['id']}: {tag.group()} has no image; download the data set again")
        media.append({"type": "image", "image": image, "inline": True})
        parts += [{"type": "text", "text": f"{text[end : tag.end()]}:"}, media[-1]]
        end = tag.end()
    parts.append({"type": "text", "text": text[end:]})
    shown = _TAG.sub(r"\g<0>:<image>", text)
    return Item(row["id"], media, shown, reference, lambda _: [dict(part) for part in parts])
