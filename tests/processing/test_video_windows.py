"""Windows of video files against the `ffmpeg` program, which imageio-ffmpeg brings."""

import random
import re
import subprocess

import numpy as np
import pytest

from support.clips import encode, mux, read_frames, read_numbers, shown_number
from support.media import AWKWARD
from vl3_jax.processing.video_reader import FrameSamplingOptions
from vl3_jax.processing.videos import open_video

NUM_WINDOWS = 40


@pytest.fixture(scope="session")
def ffmpeg():
    """Runs the `ffmpeg` program with the official filter and returns the numbers that the frames show."""
    reason = "the ffmpeg program is missing: pip install imageio-ffmpeg (it is in the extra `test`)"
    program = pytest.importorskip("imageio_ffmpeg", reason=reason).get_ffmpeg_exe()

    def run(path, start, end, fps):
        window = ["-ss", str(start), "-t", str(round(end - start, 6))]
        chain = ["-vf", f"fps={fps}:round=down,showinfo", "-fps_mode", "passthrough", "-pix_fmt", "rgb24"]
        command = [program, "-hide_banner", *window, "-i", str(path), *chain, "-f", "rawvideo", "-"]
        result = subprocess.run(command, capture_output=True, check=True, timeout=60)
        sizes = re.findall(rb" s:(\d+)x(\d+) ", result.stderr)
        if not sizes:
            return []
        width, height = map(int, sizes[0])
        return [shown_number(frame) for frame in np.frombuffer(result.stdout, np.uint8).reshape(-1, height, width, 3)]

    return run


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Clips whose clocks begin late, or whose edit lists cut off the start or move it, by name."""
    folder = tmp_path_factory.mktemp("clips")
    cut = encode(range(100), bf=2)
    for packet in cut:
        packet.pts -= 33  # an edit list hides what is before 0
        packet.dts -= 33
    mux(folder / "cut.mp4", cut)
    mux(folder / "later.mov", encode(range(100), bf=2), output_ts_offset=7.3)
    mux(folder / "no_edit_list.mp4", encode(range(100), bf=2), use_editlist=0)
    mux(folder / "plain.mkv", encode(range(100), bf=2), output_ts_offset=1.25)
    mux(folder / "late.flv", encode(range(100), bf=2), output_ts_offset=11)
    return [AWKWARD / "base.mp4", AWKWARD / "offset.mp4", *sorted(folder.iterdir())]


def test_frames_of_random_windows_equal_those_of_ffmpeg(ffmpeg, clips):
    choose = random.Random(0)
    num_frames = 0
    for number in range(NUM_WINDOWS):
        path = clips[number % len(clips)]
        start = round(choose.uniform(0, 1.6), choose.choice([0, 1, 2, 3]))
        end = round(start + choose.uniform(1, 2.5), choose.choice([1, 2, 3]) if start % 1 else 3)
        fps = choose.choice([1, 2, 3.7, 5, 12.5, 29.97])
        options = FrameSamplingOptions(start=start, end=max(end, start + 1), fps=fps, max_frames=1000)
        video = open_video(path, options)
        expected = ffmpeg(path, start, options.end, fps)
        num_frames += len(expected)
        if expected:  # otherwise the window is too short for a tick, and its middle frame is shown
            assert read_numbers(video) == expected, (path.name, options)
        assert video.timestamps == pytest.approx([start + tick / fps for tick in range(video.num_frames)])
    assert num_frames > 10 * NUM_WINDOWS


@pytest.mark.parametrize("start", [0.0, 0.56, 1.5, 2.21])
@pytest.mark.parametrize("fps", [1, 2.5, 12.5])
@pytest.mark.parametrize("name", ["late.ts", "offset.mp4"])
def test_each_frame_lies_in_the_tick_of_its_label(name, start, fps):
    video = open_video(AWKWARD / name, FrameSamplingOptions(start=start, fps=fps))
    assert video.num_frames == int((4 - start) * fps + 1e-9)
    for frame, label in zip(read_frames(video), video.timestamps, strict=True):
        time = shown_number(frame) / 25
        assert label <= time + 1e-9 < label + 1 / fps
