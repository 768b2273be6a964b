"""Images and videos are segmented from a folder on the disk, as a user does it; bad input is refused in a line."""

import numpy as np
import pytest
from PIL import Image

import vl3_jax
from support.sam2_folders import small_sam2, write_sam2_folder
from vl3_jax import sam2

pytestmark = pytest.mark.usefixtures("fast_compile")
HEIGHT, WIDTH = 60, 80
CLICK = sam2.Prompt(0, 1, [(1, 1, 1)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sam2"
    write_sam2_folder(folder, small_sam2())
    return sam2.load(folder)


@pytest.fixture(scope="module")
def frames():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)) for _ in range(3)]


def test_an_image(model, frames, tmp_path):
    frames[0].save(tmp_path / "image.png")
    one = model.segment(tmp_path / "image.png", points=[(40, 30)])
    assert one.masks.shape == (3, HEIGHT, WIDTH)
    assert list(one.scores) == sorted(one.scores, reverse=True)
    encoded = model.encode(frames[0])
    again = model.segment(encoded, points=[(40, 30, 1), (10, 10, 0)], box=(20, 10, 70, 50), logits=one.logits[0])
    assert again.masks.shape == (1, HEIGHT, WIDTH)
    np.testing.assert_array_equal(model.segment(encoded, points=[(40, 30)]).masks, one.masks)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "no point, box or mask"),
        ({"points": [(WIDTH + 1, 5)]}, "outside the frame"),
        ({"box": (5, 5, 5, 9)}, "no area"),
        ({"logits": np.zeros((3, 3))}, "logits have the shape"),
    ],
)
def test_prompts_that_cannot_be_used(model, frames, arguments, text):
    with pytest.raises(vl3_jax.InputError, match=text) as error:
        model.segment(frames[0], **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_video(model, frames):
    prompts = [sam2.Prompt(0, 7, [(40, 30, 1)]), sam2.Prompt(1, 2, box=(5, 5, 40, 40))]
    tracked = list(model.track(frames, prompts, chunk=2))
    assert [frame.index for frame in tracked] == [0, 1, 2]
    assert all(frame.objects == (7, 2) and frame.masks.shape == (2, HEIGHT, WIDTH) for frame in tracked)
    # From a camera, an object is there from its prompt on.
    stream = list(model.track(iter(frames), prompts))
    assert [frame.objects for frame in stream] == [(7,), (7, 2), (7, 2)]


@pytest.mark.parametrize(
    ("count", "prompts", "arguments", "text"),
    [
        (0, [CLICK], {}, "0 frames"),
        (3, [], {}, "no prompt"),
        (3, [sam2.Prompt(3, 1, [(1, 1, 1)])], {}, "a prompt in frame 3, and the video has 3 frames"),
        (3, [CLICK], {"start": 5}, "frame 5 to begin with"),
        (3, [CLICK] * 2, {}, "two prompts"),
        (3, [sam2.Prompt(0, 1, [(1, 1, 1)]), sam2.Prompt(1, 2, [(1, 1, 1)], correction=True)], {}, "prompt it first"),
        (
            3,
            [sam2.Prompt(0, 1, [(1, 1, 1)]), sam2.Prompt(0, 1, [(1, 1, 0)], correction=True)],
            {},
            "give all its points",
        ),
    ],
)
def test_videos_that_cannot_be_tracked(model, frames, count, prompts, arguments, text):
    with pytest.raises(vl3_jax.InputError, match=text):
        list(model.track(frames[:count], prompts, **arguments))


def test_other_checkpoints_are_refused():
    with pytest.raises(vl3_jax.InputError, match="one of SAM-2"):
        sam2.load("nano")
