"""Tests of the tokenizer: golden ids, special tokens only on request, and incremental decoding."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from support.media import TOKENIZER
from vl3_jax.errors import InputError
from vl3_jax.processing.tokenizer import Tokenizer

GOLDEN = [json.loads(line) for line in (TOKENIZER / "golden.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(TOKENIZER)


def small_tokenizer(names=("<|im_start|>", "<|im_end|>")):
    """Returns a byte-level tokenizer of single bytes with these special tokens."""
    vocabulary = {
        character: index for index, character in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(names))
    return Tokenizer(backend, "small.json")


@pytest.mark.parametrize("record", GOLDEN, ids=range(len(GOLDEN)))
def test_golden_ids(tokenizer, record):
    assert tokenizer.encode(record["text"], special=True) == record["ids"]


def test_special_ids(tokenizer):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<|stream_start|>", "<|stream_end|>"]
    assert [tokenizer.id_of(name) for name in names] == [151643, 151644, 151645, 151665, 151666, 151667]
    assert sorted(tokenizer.stop_ids) == [151643, 151645]
    assert len(tokenizer) == 151668
    assert (tokenizer.placeholder("image"), tokenizer.placeholder("video")) == (151665, 151665)
    assert (tokenizer.placeholder("image", native=True), tokenizer.placeholder("video", native=True)) == (
        151655,
        151656,
    )


@pytest.mark.parametrize("name", ["<image>", "<|im_end|>", "<|im_start|>", "<|stream_end|>", "<|video_pad|>"])
def test_the_name_of_a_special_token_is_encoded_as_plain_text(tokenizer, name):
    ids = tokenizer.encode(f"a {name} b")
    assert max(ids) < 151643
    assert tokenizer.decode(ids) == f"a {name} b"


def test_placeholders_fall_back_to_the_native_ones():
    assert small_tokenizer(["<|image_pad|>", "<|video_pad|>"]).placeholder("image") == 256
    assert small_tokenizer(["<|image_pad|>", "<|video_pad|>"]).placeholder("video") == 257
    with pytest.raises(InputError, match=r"small\.json: has no token <image>"):
        small_tokenizer().placeholder("image")
    with pytest.raises(InputError, match=r"has no token <\|stream_start\|>"):
        small_tokenizer().id_of("<|stream_start|>")


def stream_decode(tokenizer, ids):
    return list(tokenizer.stream([token] for token in ids))


@given(text=st.text())
@settings(deadline=None)
def test_streamed_text_equals_decoded_text(tokenizer, text):
    for each in (tokenizer, small_tokenizer()):
        ids = each.encode(text)
        pieces = stream_decode(each, ids)
        assert "".join(pieces) == each.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(ids=st.lists(st.integers(0, 151_667), max_size=40))
@settings(deadline=None)
def test_streamed_ids_equal_decoded_ids(tokenizer, ids):
    assert "".join(stream_decode(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=st.text("a 😀é\u0301\ufffd中\n"), cut=st.integers(0, 3), size=st.integers(1, 5))
@settings(deadline=None)
def test_pieces_of_several_tokens_are_the_same_text(tokenizer, text, cut, size):
    """Where the last character is cut off too, and where the text itself has U+FFFD."""
    for each in (tokenizer, small_tokenizer()):
        ids = each.encode(text)
        ids = ids[: max(len(ids) - cut, 0)]
        chunks = (ids[start : start + size] for start in range(0, len(ids), size))
        assert "".join(each.stream(chunks)) == each.decode(ids)


def test_a_character_is_never_split():
    byte_level = small_tokenizer()
    assert stream_decode(byte_level, byte_level.encode("a😀b")) == ["a", "", "", "", "😀", "b", ""]
    assert stream_decode(byte_level, byte_level.encode("😀")[:2])[-1] == "\ufffd"


def test_missing_or_broken_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer file"):
        Tokenizer.from_folder(tmp_path)
