"""What multiple-choice benchmarks share: lines of options; for videos prompt, scoring by index, index of the answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import Benchmark, Scoring, Verdict
from vl3_jax.evaluation.scorers.letters import letter_then_text, letters_of

_INSTRUCTION = "Answer with the option's letter from the given choices directly and only give the best option."


class ChoiceVideoBenchmark(Benchmark):
    """A benchmark whose reference is the index of an option.

    Attributes:
      text_error: What the official code raises where a response has no letter (see `letters.letter_then_text`).
      comma_wraps: Whether the official code takes commas off around a letter.
    """

    kind = "video"
    text_error = "AssertionError"
    comma_wraps = True

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        options = reference.get("options") or []
        index = letter_then_text(response, options, scoring.official, self.comma_wraps, self.text_error)
        return Verdict(float(index == reference["target"]), index)


def lettered(options: Sequence[Any]) -> str:
    """Returns the options as lines of the form `(A) text`."""
    return "".join(f"({letter}) {option}\n" for letter, option in zip(letters_of(len(options)), options, strict=True))


def choice_prompt(question: str, options: Sequence[Any]) -> str:
    """Returns the instruction of MVBench, which several benchmarks use."""
    return f"Question: {question}\nOptions:\n{lettered(options)}{_INSTRUCTION}"


def index_of_answer(answer: Any, options: Sequence[Any], where: str) -> int:
    """Returns the index of the option that equals the answer, if need be without regard to case and full stops.

    Raises:
      InputError: No option does.
    """
    for plain in (str, lambda text: str(text).strip().strip(".").lower()):
        equal = [index for index, option in enumerate(options) if plain(option) == plain(answer)]
        if equal:
            return equal[0]
    raise InputError(f"{where}: answer {answer!r} is none of its candidates; correct it or download the file again")
