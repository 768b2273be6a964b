"""Answers to mathematical problems: extraction and clean-up as in MATH-Vision's evaluation."""

import re

from vl3_jax.evaluation.scorers.unparsed import UnparsedError

_FLAGS = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_REPLACED = (
    *((" ", ""), ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", "")),
    *(("\\text", ""), ("\\mbox", ""), ("bmatrix", "pmatrix"), ("\\left", ""), ("\\right", "")),
    *(("^{\\circ}", ""), ("^\\circ", ""), ("{m}^3", ""), ("m^3", ""), ("{units}", ""), ("units", "")),
    *(("{km}", ""), ("km", "")),
)
_LATEX_REPLACED = (
    *(("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", "")),
    *(("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("$", "")),
)
_SLASHED = re.compile(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)")
_FRACTION = re.compile(r"(?:\\frac\{(-?\d+)\}\{(-?\d+)\})|(?:(-?\d+)/(-?\d+))")


def extract(response: str) -> str:
    """Returns the answer of a response, in the form that is compared with the reference.

    Raises:
      UnparsedError: A root at the end of the answer has no content, where the official code fails.
    """
    answer = response.strip()
    for letter in "ABCDE":
        ends, starts = (f" {letter}.", f" ({letter})."), (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if answer.endswith(ends) or answer.startswith(starts):
            answer = letter
    last = answer.split("is ")[-1].rstrip(".")
    if _is_number(last):
        answer = last
    if "oxed{" not in answer:
        for flag in _FLAGS:
            answer = _after(_after(answer, flag), flag.replace("the", "The"))
    elif answer.count("oxed{") > 1:
        answer = "\\boxed{" + answer.split("oxed{")[-1]
    answer = _boxed_content(answer.lower().replace("{}", ""))
    if "}" in answer and not 0 <= answer.find("{") < answer.find("}"):
        answer = answer.split("}")[0]
    answer = _replace(answer.split("=")[-1].split("\\approx")[-1], _REPLACED)
    answer = _clean_latex(answer)
    for opening, closing in ("()", "{}"):
        for letter in "abcde":
            answer = answer.replace(f"{opening}{letter}{closing}", letter)
    return answer.rstrip(".").lstrip(":").strip()


def equal_texts(answer: str, target: str) -> bool:
    """Returns whether two answers are the same text, ignoring case; nothing equals an empty one."""
    answer, target = answer.lower().strip(), target.lower().strip()
    return bool(answer) and answer == target


def equal_numbers(answer: str, target: str) -> bool:
    r"""Returns whether two numbers, `a/b` or `\frac{a}{b}` agree after rounding to two decimals."""
    first, second = _value(answer), _value(target)
    return first is not None and second is not None and round(first, 2) == round(second, 2)


def _after(answer: str, flag: str) -> str:
    following = answer.split(flag)[-1].strip()
    return following.split("\n")[0].split(". ")[0] if flag in answer else following


def _boxed_content(answer: str) -> str:
    found = re.findall(r"oxed{(.*)}", answer, re.DOTALL)
    return found[-1] if found else answer


def _replace(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def _clean_latex(text: str) -> str:
    text = _replace(text.replace("\n", ""), _LATEX_REPLACED).split("\\text{ ")[0]
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text.startswith("."):
        text = f"0{text}"
    for sign in ("=", "\\approx"):
        if text.count(sign) == 1:
            text = text.split(sign)[-1]
    text = _brace_roots(text).replace(" ", "")
    if "sqrt" in text:
        text = _brace_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    slashed = _SLASHED.fullmatch(text)
    return "\\frac{{{}}}{{{}}}".format(*slashed.groups()) if slashed else text


def _brace_roots(text: str) -> str:
    first, *others = text.split("\\sqrt")
    if "" in others:
        raise UnparsedError("IndexError")
    roots = (other if other.startswith("{") else f"{{{other[0]}}}{other[1:]}" for other in others)
    return "\\sqrt".join([first, *roots])


def _brace_fractions(text: str) -> str:
    first, *others = text.split("\\frac")
    braced = [first]
    for other in others:
        if other.startswith("{"):
            braced.append(other)
        elif len(other) < 2:
            return text
        elif other[1] == "{":
            braced.append(f"{{{other[0]}}}{other[1:]}")
        else:
            braced.append(f"{{{other[0]}}}{{{other[1]}}}{other[2:]}")
    return "\\frac".join(braced)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _value(text: str) -> float | None:
    text = text.strip()
    found = _FRACTION.fullmatch(text)
    try:
        if found:
            top, bottom = [int(number) for number in found.groups() if number is not None]
            return top / bottom
        value = float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return value if abs(value) < float("inf") else None
