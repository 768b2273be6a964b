"""Pieces of an answer's text: together they are the whole text, and they end in front of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.media import TOKENIZER
from vl3_jax.inference.answer_text import AnswerText
from vl3_jax.processing.tokenizer import Tokenizer

TOKENS = Tokenizer.from_folder(TOKENIZER)


def collect(text: str, stops) -> tuple[str, str, bool]:
    """Returns the joined pieces, the whole text, and whether a stop string was found before the last token."""
    answer, pieces, found = AnswerText(TOKENS, stops), [], False
    for token in TOKENS.encode(text):
        found = answer.add(token)
        pieces += answer.take()
        if found:
            break
    answer.end()
    pieces += answer.take()
    return "".join(pieces), answer.whole, found


@given(st.text("ab\u65e5\u00e9 \n.", max_size=30), st.lists(st.text("ab. \n", min_size=1, max_size=4), max_size=3))
def test_pieces_end_in_front_of_the_stop_string_that_is_complete_first(text, stops):
    ids = TOKENS.encode(text)
    decoded = (TOKENS.decode(ids[: count + 1]) for count in range(len(ids)))
    ended = next((part for part in decoded if any(stop in part for stop in stops)), text)
    first = min((ended.index(stop) for stop in stops if stop in ended), default=None)
    pieces, whole, found = collect(text, stops)
    assert pieces == whole == text[:first]
    assert found == (first is not None)


@pytest.mark.parametrize(("text", "stops", "expected"), [("one. two", ("wo",), "one. t"), ("abc", ("bcd",), "abc")])
def test_a_stop_string_within_or_beyond_a_token(text, stops, expected):
    assert collect(text, stops)[0] == expected
