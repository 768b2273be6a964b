"""Regions as vision tokens: which cells, how many, and where they stand in a prompt."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.sample_builder import truncate
from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.errors import InputError
from vl3_jax.inference.vision_cache import frames_of, token_identities
from vl3_jax.processing.messages import MediaPart, Region, Turn
from vl3_jax.processing.packed_batch import BatchShape, Visual, pack
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.region_cells import region_cells, region_tokens
from vl3_jax.processing.tokenizer import GROUNDING_TOKENS, Tokenizer


def mask(rows: slice, columns: slice, size=(40, 60)) -> np.ndarray:
    drawn = np.zeros(size, bool)
    drawn[rows, columns] = True
    return drawn


def test_cells_of_a_grid():
    # A grid of 4 x 6 cells of 10 x 10 pixels, each read at its first one.
    assert region_cells(mask(slice(10, 30), slice(20, 50)), 4, 6).tolist() == [8, 9, 10, 14, 15, 16]
    assert region_cells(mask(slice(0, 40), slice(0, 60)), 40, 60).tolist() == [
        place * 2400 // 256 for place in range(256)
    ], "thinned evenly"


def test_small_regions_are_repeated():
    assert region_cells(mask(slice(10, 20), slice(20, 30)), 4, 6).tolist() == [8] * 4
    assert region_cells(mask(slice(11, 20), slice(25, 32)), 4, 6).tolist() == [8] * 4, "no cell is read"
    assert region_cells(mask(slice(10, 20), slice(15, 31)), 4, 6).tolist() == [8, 9, 8, 8]


@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 40))
def test_any_mask_has_cells_of_the_grid(seed, rows, columns):
    drawn = np.random.default_rng(seed).random((17, 23)) < 0.2
    drawn[3, 4] = True
    cells = region_cells(drawn, rows, columns)
    assert 4 <= len(cells) <= 256
    assert 0 <= cells.min() <= cells.max() < rows * columns


def test_errors():
    image, video = (Visual(np.zeros((count * 4, 588), np.uint8), (count, 2, 2)) for count in (1, 2))
    assert region_tokens(Region(np.ones((3, 3)), 1), [video, image], "r").tolist() == [8, 9, 10, 11]
    for region, text in ((Region(np.zeros((2, 2))), "empty"), (Region(np.ones((2, 2)), 1), "no image")):
        with pytest.raises(InputError, match=f"region 1: .*{text}"):
            region_tokens(region, [image, video], "region 1")
    with pytest.raises(InputError, match="no image"):
        region_tokens(Region(np.ones((2, 2)), 2), [image, video], "region 3")


@pytest.fixture(scope="module")
def processor() -> Processor:
    backend = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    backend.add_special_tokens(list(GROUNDING_TOKENS))
    return Processor(Tokenizer(backend), ProcessorConfig(image_merge=2, min_tokens=4))


def prompt(processor):
    image = MediaPart("image", np.full((112, 168, 3), 90, np.uint8))
    left = Region(mask(slice(0, 112), slice(0, 56), (112, 168)))
    return processor([Turn("user", [image, "See region1", left, ".\nWhat is it?"])]).sample


def test_a_prompt_repeats_tokens_between_tags(processor):
    sample, tokenizer = prompt(processor), processor.tokenizer
    (visual,) = sample.visuals
    rows, columns = (side // 2 for side in visual.grid[1:])
    expected = np.arange(rows * columns).reshape(rows, columns)[:, : columns // 3].ravel()
    assert sample.repeated.tolist() == expected.tolist()
    start, end = (int(np.flatnonzero(sample.tokens == tokenizer.id_of(name))[0]) for name in ("<vp>", "</vp>"))
    assert sample.is_vision[start + 1 : end].all()
    assert end - start - 1 == len(expected)

    (row,) = pack([[sample]], BatchShape(len(sample.tokens), len(visual.patches), visual.num_tokens))["vision_slot"]
    assert row[start + 1 : end].tolist() == expected.tolist()
    identities = token_identities(sample, list(frames_of(sample)))
    whole = identities[sample.is_vision][: visual.num_tokens]
    assert identities[start + 1 : end].tolist() == whole[expected].tolist()


def test_regions_come_behind_all_images(processor):
    image = MediaPart("image", np.full((112, 168, 3), 90, np.uint8))
    with pytest.raises(InputError, match="put all regions behind"):
        processor([Turn("user", [image, Region(np.ones((2, 2), bool)), image, "?"])])


def test_a_prompt_can_be_cut_within_a_region(processor):
    sample = prompt(processor)
    start = int(np.flatnonzero(sample.tokens == processor.tokenizer.id_of("<vp>"))[0])
    for length in range(start - 2, len(sample.tokens)):
        cut = truncate(sample, length)
        assert cut.repeated.tolist() == sample.repeated[: max(length - start - 1, 0)].tolist()
