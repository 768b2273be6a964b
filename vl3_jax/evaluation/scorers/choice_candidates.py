"""Multiple choice of MMMU and MMMU-Pro: all letters that a response names, of which the last one counts."""

import re
from collections.abc import Callable, Mapping, Sequence

from vl3_jax.evaluation.scorers.letters import letters_of
from vl3_jax.evaluation.scorers.unparsed import UnparsedError

_ENDS = (",", ".", "!", "?", ";", ":", "'")
_FEW_WORDS = 5  # the texts of the options are looked for in longer responses only


def parse_choice(response: str, options: Sequence[str], boxed: bool = True) -> str:
    r"""Returns the letter that MMMU's rule reads out of a response.

    Args:
      response: Response of the model.
      options: Texts of the options.
      boxed: Whether the content of `\boxed{}` is the answer as it stands.

    Raises:
      UnparsedError: No option is named; the official code then draws one.
    """
    response = response.strip()
    if boxed and (found := re.search(r"boxed\{(.*?)\}", response)):
        return found.group(1)
    return _candidates(response, options, [lambda letter: f" {letter} "])


def parse_choice_pro(response: str, options: Sequence[str]) -> str:
    """Returns the letter that the rule of MMMU-Pro's authors reads out of a response.

    Raises:
      UnparsedError: No option is named.
    """
    response = response.strip()
    _, answer, text = response.rpartition("Answer:")
    named = [letter for letter in letters_of(len(options)) if letter in text] if answer else []
    if len(named) == 1:
        return named[0]
    return _candidates(response, options, [lambda letter: f"{letter} ", lambda letter: f"{letter}."])


def _candidates(response: str, options: Sequence[str], signs: Sequence[Callable[[str], str]]) -> str:
    for mark in _ENDS:
        response = response.strip(mark)
    response = f" {response} "
    texts: Mapping[str, str] = dict(zip(letters_of(len(options)), options, strict=False))
    named, place = [letter for letter in texts if f"({letter})" in response], lambda letter: f"({letter})"
    for sign in signs:
        if not named:
            named, place = [letter for letter in texts if sign(letter) in response], lambda letter: f" {letter} "
    if not named and len(response.split()) > _FEW_WORDS:
        response = response.lower()
        named, place = [x for x in texts if texts[x].lower() in response], lambda letter: texts[letter].lower()
    if not named:
        raise UnparsedError("random choice")
    return max(named, key=lambda letter: response.rfind(place(letter)))
