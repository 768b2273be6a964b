"""Multiple choice: finds the letter or the text of an option in a response."""

import re
import string
from collections.abc import Sequence

from vl3_jax.evaluation.scorers.unparsed import UnparsedError

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def letters_of(count: int) -> str:
    """Returns the letters of this many options, at most 26."""
    return string.ascii_uppercase[: max(count, 0)]


def without_answer_word(response: str) -> str:
    """Returns the response without any `answer` or `Answer`, also inside of words."""
    return response.strip().replace("answer", "").replace("Answer", "")


def first_letter(text: str, count: int) -> int | None:
    """Returns the index of the first capital letter of an option, even one inside a word; None if there is none."""
    found = _find_letter(text, count)
    return None if found is None else ord(found.group()) - ord("A")


def strict_first_letter(text: str, count: int, comma_wraps: bool) -> int | None:
    """As `first_letter`, but the blanks, parentheses and commas around the letter must come off cleanly.

    Args:
      text: Response without the word answer.
      count: Number of options.
      comma_wraps: Whether a comma beside the letter belongs to what is taken off.

    Raises:
      UnparsedError: Something besides the letter remains, as in `( B )`.
    """
    found = _find_letter(text, count)
    if found is None:
        return None
    left, right = (" (,", " ),") if comma_wraps else (" (", " )")
    before, after = text[: found.start()], text[found.end() :]
    before = before[len(before.rstrip(left)) :]
    after = after[: len(after) - len(after.lstrip(right))]
    if (before + found.group() + after).strip().strip("()") != found.group():
        raise UnparsedError("ValueError")
    return ord(found.group()) - ord("A")


def option_in_text(text: str, options: Sequence[str], digits_as_words: bool = False) -> int | None:
    """Returns the index of the first option whose text is in a response, ignoring case; None if there is none.

    Args:
      text: Response without the word answer.
      options: Texts of the options; blanks, then full stops at their ends do not count.
      digits_as_words: Whether an option that is one digit also matches its English word.
    """
    lowered = text.lower()
    for index, option in enumerate(options):
        option = option.strip().strip(".").lower()
        if option in lowered:
            return index
        if digits_as_words and len(option) == 1 and option in string.digits and DIGIT_WORDS[int(option)] in lowered:
            return index
    return None


def letter_then_text(
    response: str, options: Sequence[str], official: bool, comma_wraps: bool, text_error: str = "AssertionError"
) -> int:
    """Returns the index of the option by its letter, or without any by its text.

    Args:
      response: Response of the model.
      options: Texts of the options.
      official: Whether letters that the official rule cannot cut out are refused.
      comma_wraps: As in `strict_first_letter`.
      text_error: What the official code raises where no letter is found: AssertionError only if no text matches
        either, NameError before it looks at any text.

    Raises:
      UnparsedError: Nothing is found.
    """
    text = without_answer_word(response)
    if official:
        index = strict_first_letter(text, len(options), comma_wraps)
        if index is None and text_error == "NameError":
            raise UnparsedError(text_error)
    else:
        index = first_letter(text, len(options))
    if index is None:
        index = option_in_text(text, options)
    if index is None:
        raise UnparsedError(text_error)
    return index


def letter_or_text(response: str, options: Sequence[str]) -> str:
    """Returns the letter of the option by the first letter in the response, or without any by its text.

    Raises:
      UnparsedError: Nothing is found.
    """
    text = without_answer_word(response)
    index = first_letter(text, len(options))
    if index is None:
        index = option_in_text(text, options, digits_as_words=True)
    if index is None:
        raise UnparsedError("AssertionError")
    return letters_of(len(options))[index]


def tail(response: str) -> str:
    r"""Returns the part of a response that most likely holds the answer.

    That is the content of the last `\boxed{}`, else what follows the last "answer is" or "answer:" on its line, else
    all.
    """
    boxed = re.findall(r"\\boxed\{([^}]*)\}", response)
    if boxed:
        return boxed[-1].strip()
    phrases = list(re.finditer(r"answer is|answer:", response, re.IGNORECASE))
    if not phrases:
        return response.strip()
    return response[phrases[-1].end() :].split("\n")[0].strip().rstrip(".").strip()


def last_letter(text: str, count: int) -> str | None:
    """Returns the last `(X)`, else the last capital letter that is a word of its own; None if there is neither."""
    letters = letters_of(count)
    if not letters:
        return None
    for pattern in (rf"\(([{letters}])\)", rf"\b([{letters}])\b"):
        found = re.findall(pattern, text)
        if found:
            return found[-1]
    return None


def _find_letter(text: str, count: int) -> re.Match[str] | None:
    letters = letters_of(count)
    return re.search(f"[{letters}]", text) if letters else None
