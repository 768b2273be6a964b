"""`vl3 segment` as people run it: a text, a box, descriptions; masks, an overlay and JSON; bad input is one line."""

import json

import numpy as np
import pytest
from PIL import Image

from support.sa2va_models import write_small_sa2va
from vl3_jax.cli.main import main
from vl3_jax.processing.mask_files import decode_rle

HEIGHT, WIDTH = 120, 160
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a model and an image."""
    folder = tmp_path_factory.mktemp("segment")
    write_small_sa2va(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    (folder / "video").mkdir()
    for index in range(6):
        Image.fromarray(np.roll(pixels, 8 * index, axis=1)).save(folder / "video" / f"{index:05}.png")
    return folder


def segment(folder, *words, source="--image", file="image.png"):
    limits = "--max-new-tokens", "3", "--max-visual-tokens", "16"
    return main(["segment", "--model", str(folder / "sa2va"), source, str(folder / file), *limits, *words])


def test_a_text_and_what_it_names_in_words(folder, tmp_path, capsys):
    out, overlay = tmp_path / "masks", tmp_path / "overlay.png"
    words = "the red car", "--describe", "--out", str(out), "--overlay", str(overlay), "--json"
    assert segment(folder, *words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["text"] == "[SEG][SEG][SEG]"
    assert isinstance(printed["description"], str)
    assert list(printed["masks"]) == ["1", "2", "3"]
    for name, frames in printed["masks"].items():
        picture = np.asarray(Image.open(out / name / "0.png")) > 0
        assert (picture == decode_rle(frames["0"])).all()
        assert picture.shape == (HEIGHT, WIDTH)
    assert Image.open(overlay).size == (WIDTH, HEIGHT)


@pytest.mark.slow
def test_a_box(folder, tmp_path, capsys):
    assert segment(folder, "--box", "20,20,100,100", "--points", "50,50", "--out", str(tmp_path / "masks")) == 0
    assert capsys.readouterr().out.startswith("1: in ")
    assert (tmp_path / "masks" / "1" / "0.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sa2va", "sa2va_i"])
def test_a_video(folder, tmp_path, capsys, mode):
    words = "the red car", "--mode", mode, "--key-frames", "2", "--out", str(tmp_path / "masks"), "--json"
    assert segment(folder, *words, source="--video", file="video") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["frames"]["indices"] == list(range(6))
    assert all(list(frames) == [str(index) for index in range(6)] for frames in printed["masks"].values())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "give a text, or one object"),
        (("a car", "--box", "1,1,9,9"), "and not both"),
        (("--box", "1,1,9"), "are not 4 numbers"),
        (("--box", "1,1,900,9"), "is outside the frame"),
        (("--mask", "missing.png"), "missing.png"),
    ],
)
def test_bad_input(folder, tmp_path, capsys, words, text):
    assert segment(folder, *words, "--out", str(tmp_path / "masks")) == 2
    assert text in capsys.readouterr().err


def test_a_model_that_draws_nothing(folder, tmp_path, capsys):
    words = ["segment", "--model", str(folder / "vl3"), "--image", str(folder / "image.png"), "a car"]
    assert main([*words, "--out", str(tmp_path / "masks")]) == 2
    assert "draws no masks" in capsys.readouterr().err
