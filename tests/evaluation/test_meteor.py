"""METEOR by hand: matches of each stage, fragmentation, and what is said where a stage is missing."""

import importlib

import pytest

from vl3_jax.errors import InputError
from vl3_jax.evaluation.scorers import meteor
from vl3_jax.evaluation.scorers.meteor import STAGES, Meteor

pytest.importorskip("nltk")
WORDS = {"sofa": {"couch"}, "couch": {"sofa"}}


class Lemma:
    def __init__(self, name):
        self._name = name

    def name(self):
        return self._name


class Synset:
    def __init__(self, names):
        self._names = names

    def lemmas(self):
        return [Lemma(name) for name in self._names]


class WordNet:
    """A WordNet of two words."""

    def synsets(self, word):
        return [Synset([word, *WORDS[word]])] if word in WORDS else []


@pytest.fixture
def wordnet(monkeypatch):
    monkeypatch.setattr(meteor, "_wordnet", WordNet)


def expected(matches: int, words: int, reference: int, chunks: int) -> float:
    precision, recall = matches / words, matches / reference
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / matches) ** 3)


@pytest.mark.parametrize(
    ("stages", "caption", "value"),
    [
        (1, "A red car drives", expected(4, 4, 4, 1)),
        (1, "a car red", expected(3, 3, 4, 3)),
        (1, "a red cars", expected(2, 3, 4, 1)),
        (2, "a red cars", expected(3, 3, 4, 1)),
        (3, "blue", 0.0),
        (3, "", 0.0),
    ],
)
def test_matches_and_chunks(wordnet, stages, caption, value):
    assert Meteor(STAGES[:stages]).score(caption, ["a red car drives"]) == pytest.approx(value)


def test_synonyms_and_the_closest_reference(wordnet):
    scorer = Meteor()
    assert (scorer.stages, scorer.name) == (STAGES, "METEOR")
    assert scorer.score("the couch", ["nothing of it", "the sofa"]) == pytest.approx(expected(2, 2, 2, 1))
    assert Meteor(STAGES[:2]).score("the couch", ["the sofa"]) == pytest.approx(expected(1, 2, 2, 1))
    assert scorer.score("a.", []) == 0


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(meteor, "_wordnet", lambda: None)
    assert Meteor().name == "METEOR (exact, stem)"
    with pytest.raises(InputError, match="downloader wordnet"):
        Meteor(STAGES)


def test_without_nltk(monkeypatch):
    real = importlib.import_module

    def refuse(name, *arguments):
        if name.startswith("nltk"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", refuse)
    meteor._wordnet.cache_clear()
    with pytest.raises(InputError, match="pip install nltk"):
        Meteor()
