"""The small tokenizer: size, special tokens, reproducible training, round trips."""

import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.synthetic.registry import EVALUATED_TASKS, examples
from data_pipelines.synthetic.tokenizer import SIZE, SPECIAL_TOKENS, train_tokenizer
from data_pipelines.synthetic.vocabulary import ALL_NAMES, COLOURS
from vl3_jax.processing.tokenizer import Tokenizer

_cache = {}


def loaded(path):
    return _cache.setdefault(path, Tokenizer.from_folder(path))


def test_size_and_special_tokens(tokenizer_file):
    tokenizer = loaded(tokenizer_file)
    assert len(tokenizer) == SIZE
    assert [tokenizer.id_of(name) for name in SPECIAL_TOKENS] == list(range(SIZE - len(SPECIAL_TOKENS), SIZE))
    assert len(tokenizer.stop_ids) == 2
    assert tokenizer.decode(tokenizer.encode("<|im_end|>")) == "<|im_end|>"  # in user input it is text
    assert not set(tokenizer.encode("<|im_end|> <image>")) & set(map(tokenizer.id_of, SPECIAL_TOKENS))
    assert tokenizer.encode("a<image>", special=True)[-1] == tokenizer.id_of("<image>")


def test_training_is_reproducible(tokenizer_file):
    assert train_tokenizer().to_str() == tokenizer_file.read_text()


def test_words_have_few_tokens(tokenizer_file):
    tokenizer = loaded(tokenizer_file)
    for name in (*ALL_NAMES, *COLOURS):
        pieces = len(name.replace("-", " ").split())
        assert len(tokenizer.encode(name)) <= pieces
        assert len(tokenizer.encode("the " + name)) <= pieces + 1 + name.isdigit()
    assert len(tokenizer.encode("4071")) == 4
    for task in EVALUATED_TASKS:
        for sample in examples(task, "test", 0, 5):
            if not sample.utterances:
                assert len(tokenizer.encode(sample.question)) <= 30
                assert len(tokenizer.encode(sample.answer)) <= 30


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_round_trips(text, tokenizer_file):
    tokenizer = loaded(tokenizer_file)
    normal = unicodedata.normalize("NFC", text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == normal
    assert "".join(tokenizer.stream([token] for token in ids)) == normal
