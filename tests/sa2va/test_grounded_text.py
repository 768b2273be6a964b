"""Answers with masks are read from their ids, whatever order the tags come in."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.processing.tokenizer import GROUNDING_TOKENS, Tokenizer
from vl3_jax.sa2va.grounded_text import read_grounded


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    backend.add_special_tokens(list(GROUNDING_TOKENS))
    return Tokenizer(backend)


@pytest.mark.parametrize(
    ("answer", "caption", "phrases"),
    [
        ("It is [SEG].", "It is .", [None]),
        ("No car.", "No car.", []),
        (
            "A <p> red  car </p> [SEG] near <p> two dogs </p> [SEG] .",
            "A red car near two dogs .",
            ["red car", "two dogs"],
        ),
        ("<p> a </p> <p> b </p> [SEG] [SEG] [SEG]", "a b", ["a", "b", None]),
        ("[SEG] <p> a </p> [SEG]", "a", [None, "a"]),
        ("</p> x <p> a <p> b </p> [SEG] <p> c [SEG]", "x a b c", ["b", None]),
        ("[SEG]", "", [None]),
        ("", "", []),
    ],
)
def test_captions_and_phrases(tokenizer, answer, caption, phrases):
    ids = [*tokenizer.encode(answer, special=True), *tokenizer.stop_ids[:1]]
    read = read_grounded(ids, tokenizer)
    assert (read.text, read.caption) == (answer, caption)
    assert [named.phrase for named in read.objects] == phrases
    assert [ids[named.place] for named in read.objects] == [tokenizer.id_of("[SEG]")] * len(phrases)


@given(st.lists(st.sampled_from([*GROUNDING_TOKENS, " a", " b.", "\n", "é"]), max_size=12))
def test_any_order(tokenizer, pieces):
    ids = tokenizer.encode("".join(pieces), special=True)
    read = read_grounded(ids, tokenizer)
    assert read.text == "".join(pieces).strip()
    assert len(read.objects) == pieces.count("[SEG]")
    assert not any(tag in read.caption for tag in GROUNDING_TOKENS)


def test_what_a_user_types_is_no_tag(tokenizer):
    assert read_grounded(tokenizer.encode("[SEG] <p>"), tokenizer).objects == ()
