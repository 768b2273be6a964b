"""CIDEr-D by hand."""

import math

import pytest

from vl3_jax.evaluation.scorers.cider import cider


def test_cosines_of_rare_words():
    """Of two images; all words are in one reference each, so they weigh the same."""
    references = [["a red box"], ["the dog"]]
    equal, half = cider(["A red box.", "a dog"], references)
    assert equal == pytest.approx(10 * 3 / 4), "there are no four words in a row"
    assert half == pytest.approx(10 * (1 / 2) / 4), "one of two words, and no pair"
    assert cider(["", "cat"], references) == [0, 0]
    assert cider(["a red box"], [["a red box"]]) == [0], "no word of a single image is rare"
    assert cider([], []) == []


def test_words_of_every_image_do_not_count():
    """The word that stands in both references has no weight."""
    first, _ = cider(["a", "x"], [["a box"], ["a dog"]])
    assert first == 0


def test_length_and_repetition():
    """A word counts as often as the reference has it, and a caption that is longer by three words is punished."""
    (once, _), (often, _) = (cider([caption, "x"], [["box"], ["dog"]]) for caption in ("box", "box box box box"))
    assert once == pytest.approx(10 / 4)
    assert often == pytest.approx(once / 4 * math.exp(-(3**2) / (2 * 6**2)))


def test_the_mean_over_references():
    (score, _) = cider(["a red box", "x"], [["a red box", "two bars"], ["dog"]])
    (alone, _) = cider(["a red box", "x"], [["a red box"], ["dog"]])
    assert score == pytest.approx(alone / 2)
