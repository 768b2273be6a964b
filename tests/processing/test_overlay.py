"""Pictures and videos with masks over them."""

import av
import numpy as np
import pytest
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing.overlay import VideoWriter, draw_masks, object_colour, overlay_file

GREY = Image.new("RGB", (80, 60), (100, 100, 100))


def test_each_object_has_a_colour_of_its_own():
    colours = np.array([object_colour(number) for number in range(20)])
    distances = np.abs(colours[:, None] - colours).sum(-1) + 999 * np.eye(20)
    assert distances.min() > 25
    assert np.abs(colours[:5, None] - colours[:5]).sum(-1)[~np.eye(5, dtype=bool)].min() > 150


def test_a_mask_is_drawn_in_its_colour_and_nothing_else():
    mask = np.zeros((60, 80), bool)
    mask[30:50, 20:60] = True
    drawn = np.asarray(draw_masks(GREY, [mask, np.zeros_like(mask)], ["cat", "dog"]))
    assert np.asarray(GREY).max() == 100  # the picture itself stays
    changed = (drawn != 100).any(-1)
    assert changed[mask].all()
    rows, columns = np.nonzero(changed & ~mask)  # the name, above the mask's corner
    assert rows.size
    assert rows.max() < 30
    assert columns.min() >= 20
    np.testing.assert_array_equal(drawn[30, 20], object_colour(0))  # the outline
    np.testing.assert_allclose(drawn[40, 40], (np.array(object_colour(0)) + 100) / 2, atol=1)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (700, 5)])
def test_a_picture_too_small_for_a_name(size):
    image = Image.new("RGB", size[::-1])
    assert draw_masks(image, np.ones((1, *size), bool), ["a long name"]).size == image.size


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("size", [(60, 80), (61, 81), (1, 1)])
def test_a_video(tmp_path, ending, size):
    """Frames, their times and odd sizes are kept; frames of another size are fitted in."""
    path, times = tmp_path / f"video.{ending}", [5.0, 5.04, 5.5, 6.0]
    with VideoWriter(path, size, rate=25) as writer:
        for number, time in enumerate(times):
            writer.write(Image.new("RGB", (80, 60) if number == 3 else size[::-1], (60 * number,) * 3), time)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.04, 0.5, 1.0], abs=2e-3)
    assert (frames[0].height, frames[0].width) == tuple(side + side % 2 for side in size)
    levels = [frame.to_ndarray(format="rgb24").mean() for frame in frames]
    np.testing.assert_allclose(levels, [0, 60, 120, 180], atol=6)


def test_times_that_run_backwards_or_stand_still(tmp_path):
    with VideoWriter(tmp_path / "video.mp4", (60, 80), rate=10) as writer:
        for time in (1.0, 0.9, 0.9, 0.5):
            writer.write(GREY, time)
    with av.open(str(tmp_path / "video.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([0, 0.1, 0.1, 0.5], abs=2e-3)
    assert sorted(set(times)) == times


def test_what_is_written_can_be_played_where_the_process_ends(tmp_path):
    """The file of a video that is not complete is copied away while it is written."""
    with VideoWriter(tmp_path / "video.mp4", (60, 80), rate=25) as writer:
        for number in range(200):
            writer.write(GREY, number / 25)
        (tmp_path / "part.mp4").write_bytes((tmp_path / "video.mp4").read_bytes())
    with av.open(str(tmp_path / "part.mp4")) as container:
        assert len(list(container.decode(video=0))) >= 75


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("there.mp4", "exists"),
        ("new.gif", "written as .mp4"),
        ("no/new.mp4", "its folder does not exist"),
        ("a" * 400 + ".mp4", "cannot be written"),
        ("gs://bucket/new.mp4", "is a URL"),
    ],
)
def test_files_that_are_refused(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.mp4").touch()
    with pytest.raises(InputError, match=text):
        overlay_file(name, of_video=True)
