"""All frames of a video by index, whatever it is and in whatever order they are asked for."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from support.media import MEDIA, read_number, write_video
from vl3_jax.processing.video_frames import KEPT_FRAMES, VideoFrames
from vl3_jax.processing.videos import open_video

COUNT = 40


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "numbers.mp4"
    write_video(path, [40 * number for number in range(COUNT)])
    return path


def numbers(frames: VideoFrames, indices) -> list[int]:
    return [read_number(np.asarray(frames[index])) for index in indices]


@given(st.lists(st.integers(0, COUNT - 1), max_size=8))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order(video, indices):
    assert numbers(VideoFrames(open_video(video)), indices) == indices


@pytest.mark.parametrize("step", [1, -1])
def test_each_frame_is_decoded_about_once(video, step, monkeypatch):
    """In chunks, each looked at twice, as tracking with an overlay does; and few frames are held."""
    frames = VideoFrames(open_video(video))
    decoded, decode = [], frames.reader.decode

    def counting(indices):
        for index, frame in decode(indices):
            decoded.append(index)
            yield index, frame

    monkeypatch.setattr(frames.reader, "decode", counting)
    order = range(COUNT)[::step]
    for first in range(0, COUNT, 8):
        chunk = order[first : first + 8]
        assert numbers(frames, [*chunk, *chunk]) == [*chunk, *chunk]
        assert len(frames._kept) <= KEPT_FRAMES
    assert len(decoded) <= COUNT + 1


def test_as_a_sequence(video):
    frames = VideoFrames(open_video(video))
    assert len(frames) == COUNT
    assert read_number(np.asarray(frames[-1])) == COUNT - 1
    assert [read_number(np.asarray(frame)) for frame in frames[2:6:2]] == [2, 4]
    with pytest.raises(IndexError):
        frames[COUNT]
    assert frames.times == pytest.approx([0.04 * number for number in range(COUNT)])


@pytest.mark.parametrize("name", ["city.gif", "city.webp", "city_vp9.webm", "city_vfr.mp4", "city_rotated90.mp4"])
def test_kinds_of_videos(name):
    """Frames from the middle on are those that are decoded from the start on; times ascend."""
    frames, again = (VideoFrames(open_video(MEDIA / "edge" / name)) for _ in range(2))
    count = len(frames)
    assert count > 10
    assert all(first < second for first, second in zip(frames.times, frames.times[1:], strict=False))
    for index in (count - 1, count // 2):
        np.testing.assert_array_equal(np.asarray(frames[index]), np.asarray(again[index - 1 : index + 1][1]))
        assert frames[index].size == (frames.reader.width, frames.reader.height)


def test_a_folder_and_frames_in_memory(tmp_path):
    images = [Image.new("RGB", (8, 6), (number, 0, 0)) for number in range(12)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    for source in (tmp_path, images):
        assert [frame.getpixel((0, 0))[0] for frame in VideoFrames(open_video(source))] == [*range(12)]


def test_damaged_frames_keep_their_place(tmp_path):
    """Where frames are lost, one beside each stands in its place, and a warning names it."""
    path = tmp_path / "damaged.mp4"
    write_video(path, [40 * number for number in range(COUNT)], gop=5)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat")
    length = int.from_bytes(content[start - 4 : start])
    damaged = slice(start + length * 2 // 5, start + length * 3 // 5)
    content[damaged] = bytes(len(content[damaged]))
    path.write_bytes(content)
    frames = VideoFrames(open_video(path))
    shown = numbers(frames, range(len(frames)))
    assert len(shown) == COUNT
    assert shown[:3] == [0, 1, 2]
    assert shown[-3:] == [COUNT - 3, COUNT - 2, COUNT - 1]
    assert frames.reader.warnings
    assert all("is damaged; a frame beside it" in warning for warning in frames.reader.warnings)


def test_some_frames(video):
    """Those between them are not there, and each is called by its index in the video."""
    chosen = [3, 4, 17, 39]
    frames = VideoFrames(open_video(video), chosen)
    assert (len(frames), frames.times) == (4, pytest.approx([0.04 * index for index in chosen]))
    assert numbers(frames, [0, 2, 1, 3]) == [3, 17, 4, 39]
