"""Tests of target sizes: golden values of the released processor, properties, and the transformers port's rule."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3_jax.errors import InputError
from vl3_jax.processing.resize import ResizeItem, target_sizes

GOLDEN = [  # (height, width) of the input and of the target at merge 1 and merge 2; one image, 16384 tokens
    ((1080, 1920), (1078, 1918), (1092, 1932)),
    ((720, 1280), (714, 1274), (728, 1288)),
    ((480, 640), (476, 644), (476, 644)),
    ((360, 640), (364, 644), (364, 644)),
    ((224, 224), (224, 224), (224, 224)),
    ((4000, 3000), (2058, 1540), (4004, 2996)),
    ((8000, 6000), (2058, 1540), (4116, 3080)),
    ((30, 30), (56, 56), (112, 112)),
    ((10, 200), (14, 252), (28, 504)),
    ((37, 100), (42, 98), (84, 196)),
    ((20, 3000), (14, 2996), (28, 2996)),
    ((5, 900), (14, 756), (28, 1512)),
    ((14, 4000), (14, 4004), (28, 1904)),
]
GOLDEN_VIDEO = [  # frames, input, target and tokens at a budget of 16384, target and tokens at 10240
    (1, (1080, 1920), (1092, 1932), 2691, (1092, 1932), 2691),
    (10, (1080, 1920), (840, 1484), 15900, (672, 1176), 10080),
    (10, (720, 1280), (728, 1288), 11960, (672, 1176), 10080),
    (32, (1080, 1920), (448, 840), 15360, (364, 644), 9568),
    (64, (1080, 1920), (336, 588), 16128, (252, 448), 9216),
    (128, (1080, 1920), (224, 420), 15360, (168, 308), 8448),
    (180, (1080, 1920), (196, 336), 15120, (140, 280), 9000),
    (32, (360, 640), (364, 644), 9568, (364, 644), 9568),
]


def tokens(size, item):
    return size[0] * size[1] // item.factor**2 * item.frames


@pytest.mark.parametrize(("size", "merge_1", "merge_2"), GOLDEN)
@pytest.mark.parametrize("mode", ["official", "native"])
def test_one_image(size, merge_1, merge_2, mode):
    if mode == "native" and max(size) > 200 * min(size):
        with pytest.raises(InputError, match=r"thin\.png: 4000 x 14 pixels.*crop"):
            target_sizes([ResizeItem(*size, 1, name="thin.png")], mode)
        return
    assert target_sizes([ResizeItem(*size, 1)], mode) == [merge_1]
    assert target_sizes([ResizeItem(*size, 2)], mode) == [merge_2]


@pytest.mark.parametrize(("frames", "source", "size", "total", "small_size", "small_total"), GOLDEN_VIDEO)
@pytest.mark.parametrize("mode", ["official", "native"])
def test_one_video(frames, source, size, total, small_size, small_total, mode):
    item = ResizeItem(*source, 2, frames)
    assert target_sizes([item], mode) == [size]
    assert tokens(size, item) == total
    assert target_sizes([item], mode, max_tokens=10_240) == [small_size]
    assert tokens(small_size, item) == small_total


def test_official_images_share_the_budget_and_native_ones_do_not():
    images = [ResizeItem(4000, 3000, 1), ResizeItem(4000, 3000, 1)]
    assert target_sizes(images) == [(1456, 1092)] * 2
    assert target_sizes(images, "native") == [(2058, 1540)] * 2


sides = st.integers(1, 6000)
items = st.builds(ResizeItem, sides, sides, st.sampled_from([1, 2]), st.sampled_from([1, 1, 7, 180]))


@given(items=st.lists(items, min_size=1, max_size=5), budget=st.integers(16, 20_000))
def test_sizes_are_multiples_of_the_merge_block(items, budget):
    for item, (height, width) in zip(items, target_sizes(items, max_tokens=budget), strict=True):
        assert height >= item.factor
        assert width >= item.factor
        assert height % item.factor == width % item.factor == 0


@given(
    height=st.integers(50, 4000), width=st.integers(50, 4000), frames=st.integers(1, 300), merge=st.sampled_from([1, 2])
)
def test_a_video_stays_within_the_budget_and_above_the_minimum(height, width, frames, merge):
    item = ResizeItem(height, width, merge, frames)
    size = target_sizes([item])[0]
    assert tokens(size, item) >= 16 * frames
    if max(height, width) < 20 * min(height, width):
        assert tokens(size, item) <= 16_384


@given(
    image=st.builds(ResizeItem, sides, sides, st.just(1)),
    video=st.builds(ResizeItem, sides, sides, st.just(2), st.integers(1, 180)),
)
def test_mixed_merge_sizes_share_one_scale(image, video):
    total = sum(i.frames * math.ceil(i.height / i.factor) * math.ceil(i.width / i.factor) for i in (image, video))
    shrink = math.sqrt(total / 16_384) if total > 16_384 else 1.0
    to_multiple = math.floor if total > 16_384 else round
    for item, size in zip((image, video), target_sizes([image, video]), strict=True):
        expected = tuple(
            max(to_multiple(side / shrink / item.factor), 1) * item.factor for side in (item.height, item.width)
        )
        assert size == expected


@settings(deadline=None)  # the first import takes seconds
@given(height=sides, width=sides, merge=st.sampled_from([1, 2]), frames=st.integers(1, 200))
def test_native_sizes_equal_smart_resize(height, width, merge, frames):
    pytest.importorskip("support.reference", reason="the reference is not installed: pip install -e '.[parity]'")
    from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import smart_resize

    item = ResizeItem(height, width, merge, frames)
    limits = (16 * item.factor**2, 16_384 * item.factor**2 // frames)
    try:
        expected = smart_resize(height, width, item.factor, *limits)
    except ValueError:
        with pytest.raises(InputError):
            target_sizes([item], "native")
        return
    # The port leaves a side of 0 where it neither shrinks nor enlarges; here the minimum is one block.
    assert target_sizes([item], "native") == [tuple(max(side, item.factor) for side in expected)]
