"""Masks in files, and their run lengths."""

import contextlib
import io
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools.mask import decode

from vl3_jax.errors import InputError
from vl3_jax.processing.mask_files import (
    MASK_FORMATS,
    MaskTable,
    check_object_name,
    decode_rle,
    encode_rle,
    mask_entry,
    save_mask,
)

MASKS = arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@given(MASKS)
def test_run_lengths_hold_a_mask(mask):
    rle = json.loads(json.dumps(encode_rle(mask)))
    assert rle["size"] == [*mask.shape]
    np.testing.assert_array_equal(decode(rle), mask)
    np.testing.assert_array_equal(decode_rle(rle), mask)
    runs = [len(list(group)) for _, group in itertools.groupby(mask.T.ravel())]
    numbers = [0] * bool(mask[0, 0]) + runs
    np.testing.assert_array_equal(decode_rle({"size": rle["size"], "counts": numbers}), mask)


@given(MASKS, st.data())
def test_run_lengths_from_anywhere(mask, data):
    """Text that was changed is a mask of its size, or it is refused."""
    rle = encode_rle(mask)
    text, other = list(rle["counts"]), st.characters() | st.sampled_from("0PQ_`ol")
    for place in data.draw(st.lists(st.integers(0, len(text) - 1), max_size=4)):
        text[place] = data.draw(other)
    with contextlib.suppress(ValueError):
        assert (
            decode_rle({"size": rle["size"], "counts": "".join(text[: data.draw(st.integers(0, 99))])}).size
            == mask.size
        )


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        ([3, 4], [4, 1, 1, 3]),
        ([3, 4], [4, 1, 1, 3, 4]),
        ([3, 4], [13, -1]),
        ([3, 4], [12.0]),
        ([3, 4], [[12]]),
        ([3, 4], "oooooooooooooooo"),
        ([3, 4], ""),
        ([3, -4], [12]),
        ([3.0, 4], [12]),
        ([2**20, 2**20], [2**40]),
    ],
)
def test_run_lengths_that_are_none(size, counts):
    with pytest.raises(ValueError, match=r"run lengths|a mask of"):
        decode_rle({"size": size, "counts": counts})


def test_run_lengths_are_those_of_coco():
    """Runs of 0 and 1 in turn, down the columns; six bits a character, and from the third run on differences."""
    mask = np.zeros((3, 4), bool)
    mask[1, 1], mask[:, 2] = True, True  # runs of 4, 1, 1, 3, 3
    assert encode_rle(mask) == {"size": [3, 4], "counts": "41122"}


@pytest.mark.parametrize("mask_format", MASK_FORMATS)
def test_files(tmp_path, mask_format):
    mask = np.eye(5, 7, dtype=bool)
    save_mask(tmp_path, "the cat", 12, mask, mask_format)
    path = tmp_path / "the cat" / f"12.{mask_format}"
    read = {"png": lambda: np.asarray(Image.open(path)) == 255, "npy": lambda: np.load(path)}
    read["json"] = lambda: decode(json.loads(path.read_text()))
    np.testing.assert_array_equal(read[mask_format](), mask)


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        save_mask(tmp_path / "gone", 1, 0, np.ones((2, 2), bool))


def test_the_table_of_all_masks(tmp_path):
    out = io.StringIO()
    with MaskTable(tmp_path) as table:
        for frame in range(3):
            for obj in (7, 'a "name"'):
                table.add(obj, frame, mask_entry(np.full((2, 3), frame > 0), frame / 2, 1))
        assert not list(tmp_path.iterdir())
        table.write_json(out, {"out": "folder"})
    result = json.loads(out.getvalue())
    assert list(result) == ["out", "masks"]
    assert list(result["masks"]) == ["7", 'a "name"']
    assert [entry["score"] for entry in result["masks"]["7"].values()] == [0, 0.5, 1]
    assert decode(result["masks"]["7"]["2"]).all()


@pytest.mark.parametrize("name", ["", ".", "..", ".git", "a/b", "a\\b", "a:b", " a", "a\n", "a\0", "x" * 101, "é" * 51])
def test_names_that_no_folder_has(name):
    with pytest.raises(InputError, match="that a folder may have"):
        check_object_name(name)


@pytest.mark.parametrize("name", ["1", "the cat", "кот", "猫", "a.b"])
def test_names_that_folders_have(name):
    check_object_name(name)
