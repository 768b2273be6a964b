"""What is asked for masks, word for word."""

import numpy as np
import pytest

from vl3_jax.processing.messages import Region
from vl3_jax.sa2va.templates import DESCRIBE, mask_request, region_request, video_expression


@pytest.mark.parametrize(
    ("text", "image", "video"),
    [
        ("the red car", " Please segment the red car in this image.", "Please segment the red car."),
        (" the red car. ", " Please segment the red car in this image.", "Please segment the red car."),
        ("Who is tall?", *[" Who is tall? Please respond with a segmentation mask."] * 2),
        ("Please segment all dogs", *["Please segment all dogs"] * 2),
        ("can you find the cat?", *["can you find the cat?"] * 2),
        ("Where is it? Answer with a mask.", *["Where is it? Answer with a mask."] * 2),
        ("findings on a table", " Please segment findings on a table in this image.", None),
    ],
)
def test_requests(text, image, video):
    assert mask_request(text) == image
    if video is not None:
        assert mask_request(text, video=True) == video


def test_expressions_of_benchmarks_are_never_taken_for_orders():
    assert video_expression("show dog in a ring") == "Please segment show dog in a ring."
    assert video_expression("mask of wood?") == " mask of wood? Please respond with a segmentation mask."


def test_regions():
    masks = [np.ones((2, 2), bool), np.eye(2, dtype=bool)]
    parts = region_request(masks, "What is region2?")
    written = "".join(f"<{int(part.mask.sum())}>" if isinstance(part, Region) else part for part in parts)
    assert written == "There are 2 part regions in the picture: region1<4>, region2<2>.\nWhat is region2?"
    assert region_request(masks[:1])[-1] == f".\n{DESCRIBE}"
