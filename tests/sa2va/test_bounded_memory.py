"""Memory is bounded: of long videos, and of large images."""

import json
import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
from PIL import Image

import vl3_jax as vl3
from support.media import write_video
from support.sa2va_models import write_small_sa2va

pytestmark = [pytest.mark.slow]
FRAMES, OBJECTS = 300, 3


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("mode", ["sa2va", "sa2va_i"])
def test_a_long_video_with_three_objects(tmp_path, mode):
    """From frame 50 on, memory grows by less than 5 %."""
    model = vl3.load(write_small_sa2va(tmp_path, draws="always"))
    write_video(tmp_path / "video.mp4", range(0, 40 * FRAMES, 40), 240, 320)
    limits = {"max_new_tokens": OBJECTS, "max_visual_tokens": 64}
    result = model.segment("the red car", video=tmp_path / "video.mp4", mode=mode, **limits)
    process, sizes = psutil.Process(), []
    for frame in result.frames():
        assert frame.masks.shape == (OBJECTS, 240, 320)
        sizes.append(process.memory_info().rss)
    assert len(sizes) == FRAMES
    print(f"{mode}: resident {sizes[50] / 2**20:.0f} MiB at frame 50, at most {max(sizes[50:]) / 2**20:.0f} after it")
    assert max(sizes[50:]) < 1.05 * sizes[50]


@pytest.mark.parametrize("command", ["segment", "ask"])
def test_a_large_image(tmp_path, command):
    """An image of 12 megapixels is answered, with three masks of its size, within 4 GB of a process of its own."""
    folder = write_small_sa2va(tmp_path, draws="always", released="tiny")
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).resize((4000, 3000)).save(tmp_path / "large.jpg")
    words = [command, "--model", folder, "--image", tmp_path / "large.jpg", "the red car", "--json"]
    words += ["--max-new-tokens", OBJECTS]
    if command == "segment":
        words += ["--out", tmp_path / "masks", "--overlay", tmp_path / "overlay.png"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vl3_jax.cli.main", *map(str, words)], stdout=subprocess.PIPE, env=one_device()
    )
    with process.stdout as output:
        printed = json.loads(output.read())
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    sizes = [entry["size"] for frames in printed["masks"].values() for entry in frames.values()]
    print(f"{command}: peak of {usage.ru_maxrss / 1e6:.2f} GB")
    assert sizes == [[3000, 4000]] * OBJECTS
    assert usage.ru_maxrss * 1024 < 4e9


def one_device() -> dict[str, str]:
    """Returns the environment of a command outside the tests, which pretend that the CPU is several devices."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
