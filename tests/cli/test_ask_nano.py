"""`vl3 ask` with nano on each kind of real file."""

import json

import pytest

from support.media import MEDIA
from vl3_jax.cli.main import main

IMAGES = ["images/handwriting.png", "images/chart_seattle_rain.png", "images/huckleberry_page.jpg"]
VIDEOS = ["city.gif", "city.webp", "city_vp9.webm", "city_odd_355x201.avi", "city_vfr.mp4", "city_truncated.mp4"]
SMALL = ["--max-visual-tokens", "300", "--max-new-tokens", "8"]
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("file", [*IMAGES, *(f"edge/{name}" for name in VIDEOS)])
def test_a_file_is_answered(capsys, file):
    flag = "--image" if file in IMAGES else "--video"
    assert main(["ask", "--model", "nano", "--json", *SMALL, flag, str(MEDIA / file), "What is shown?"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert 0 < answer["visual_tokens"] <= answer["visual_tokens_before_pruning"] <= 300
    assert answer["token_ids"]
    assert answer["finish_reason"] in ("stop", "length")


def test_an_unreadable_file_is_explained(capsys):
    file = MEDIA / "edge" / "city_no_index.mp4"
    assert main(["ask", "--model", "nano", "--video", str(file), "What is shown?"]) == 2
    error = capsys.readouterr().err
    assert file.name in error
    assert error.count("\n") == 1
