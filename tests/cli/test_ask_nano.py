"""`vl3 ask` with nano on each kind of real file."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from support.media import MEDIA, TOKENIZER
from vl3_jax.cli import generation_flags
from vl3_jax.cli.main import main
from vl3_jax.inference.chat_model import GenerationOutput
from vl3_jax.processing.processor import Processor

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


def test_the_frames_are_saved(capsys, tmp_path):
    image, video = (str(MEDIA / name) for name in (IMAGES[0], "edge/city_vp9.webm"))
    folder = tmp_path / "frames"
    command = ["ask", "--model", "nano", "--json", *SMALL, "--video", video, "--image", image]
    assert main([*command, "--save-frames", str(folder), "What is shown?"]) == 0
    answer = json.loads(capsys.readouterr().out)
    times = enumerate(answer["frames"][0]["timestamps"])
    stems = [*(f"00_{number:04}_{time:.2f}" for number, time in times), "01"]
    assert answer["saved_frames"] == [str(folder / f"{stem}.png") for stem in stems]
    sizes = [Image.open(path).size for path in answer["saved_frames"]]
    patches = [width // 14 * (height // 14) for width, height in sizes]
    assert sum(patches[:-1]) / 4 + patches[-1] == answer["visual_tokens_before_pruning"]
    assert len(list(folder.glob("*_kept.png"))) == len(answer["frames"][0]["indices"])


def test_a_folder_that_cannot_be_used_is_refused_before_the_model_is_loaded(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["ask", "--model", "nowhere", "--image", "a.png", "--save-frames", str(tmp_path), "Q"]) == 2
    error = capsys.readouterr().err
    assert error == f"vl3 ask: {tmp_path}: the folder holds other files; give a new or an empty one for the pictures\n"


def test_a_question_without_media_leaves_the_folder_empty(capsys, tmp_path, monkeypatch):
    def answer(messages, **_settings):
        return GenerationOutput("Hello", [1], "stop", Processor.from_folder(TOKENIZER)(messages), None, {"decode": 0})

    monkeypatch.setattr(generation_flags, "load_model", lambda _arguments: SimpleNamespace(answer=answer))
    assert main(["ask", "--model", "nano", "--save-frames", str(tmp_path), "Hello"]) == 0
    assert "no image or video" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
