"""Frames of a file, of an iterator and of a camera give the same masks, and clicks come while they are shown."""

import numpy as np
import pytest

import vl3_jax
from support.media import write_video
from support.sam2_folders import small_sam2, write_sam2_folder
from vl3_jax import sam2
from vl3_jax.processing.video_frames import VideoFrames
from vl3_jax.processing.videos import open_video

pytestmark = pytest.mark.usefixtures("fast_compile")
CLICK, CORRECTION = sam2.Prompt(0, "cat", [(30, 20, 1)]), sam2.Prompt(2, "cat", [(5, 5, 0)], correction=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    write_sam2_folder(folder / "sam2", small_sam2("2.0"))
    write_video(folder / "video.mp4", [0, 40, 80, 120], 48, 64)
    return folder


@pytest.mark.slow
def test_files_iterators_and_cameras(folder):
    model, path = sam2.load(folder / "sam2"), folder / "video.mp4"
    expected = [frame.masks for frame in model.track(path, [CLICK, CORRECTION], chunk=1)]
    camera = VideoFrames(open_video(path))
    for frame, masks in zip(model.track(iter(camera), [CLICK, CORRECTION]), expected, strict=True):
        np.testing.assert_array_equal(frame.masks, masks)
    tracker = model.tracker()
    assert tracker.objects == ()
    for index, image in enumerate(camera):
        if index == CLICK.frame:
            tracker.prompt(image, [CLICK])
        (frame,) = tracker.step([image], [index])
        if index == CORRECTION.frame:
            frame = tracker.correct([CORRECTION])
        assert (frame.index, frame.objects) == (index, ("cat",))
        np.testing.assert_array_equal(frame.masks, expected[index])


@pytest.mark.parametrize(
    ("frames", "arguments", "text"),
    [
        ("nowhere.mp4", {}, "nowhere.mp4: no such video file or folder"),
        (b"no video", {}, "video bytes: not a readable video"),
        (iter(()), {}, "0 frames"),
        (iter([np.zeros((4, 4, 3), np.uint8)]), {"reverse": True}, "give a sequence"),
        (
            [np.zeros((48, 64, 3), np.uint8)] * 4,
            {"start": 3},
            "tracking from frame 3 does not reach",
        ),
    ],
)
def test_frames_that_cannot_be_tracked(folder, frames, arguments, text):
    model = sam2.load(folder / "sam2")
    with pytest.raises(vl3_jax.InputError, match=text) as error:
        list(model.track(frames, [CLICK, CORRECTION], **arguments))
    assert "\n" not in str(error.value)
