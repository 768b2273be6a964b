"""Masks in `vl3 ask --json`: of an image, several ones, a video, a pipe; and where there are none."""

import dataclasses
import json
import os
import threading

import numpy as np
import pytest
from PIL import Image

import vl3_jax as vl3
from support.media import MEDIA
from support.sa2va_models import write_small_sa2va
from vl3_jax.cli.main import main
from vl3_jax.processing.mask_files import decode_rle
from vl3_jax.processing.object_prompts import Prompt
from vl3_jax.processing.video_frames import VideoFrames
from vl3_jax.processing.videos import open_video

HEIGHT, WIDTH = 120, 160
LIMITS = {"max_new_tokens": 3, "max_visual_tokens": 16}
QUESTION = "Please segment the red car in this image."
VIDEO = MEDIA / "edge" / "city_vp9.webm"
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a model and two images."""
    folder = tmp_path_factory.mktemp("ask")
    write_small_sa2va(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    Image.fromarray(pixels[:90]).save(folder / "other.png")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return vl3.load(folder / "sa2va")


@pytest.fixture
def ask(folder, model, capsys, monkeypatch):
    """Returns a function that runs the command with a model that is loaded once, in the folder of the images.

    It returns the JSON object, and what is on stderr.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setattr("vl3_jax.cli.generation_flags.load_model", lambda arguments: model)

    def asked(*words, question=QUESTION) -> dict:
        limits = [f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()]
        assert main(["ask", "--model", "sa2va", "--json", *limits, *map(str, words), question]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out) | {"stderr": captured.err}

    return asked


def decoded(masks) -> dict[str, dict[str, np.ndarray]]:
    return {name: {index: decode_rle(entry) for index, entry in frames.items()} for name, frames in masks.items()}


def test_images(ask, model):
    """Each is drawn in alone, and counts from 0; Python gives the same."""
    assert {"text", "token_ids", "seconds", "masks"} <= ask("--image", "image.png").keys()
    masks = decoded(ask("--image", "image.png", "--image", "other.png")["masks"])
    images = [np.asarray(Image.open(name)) for name in ("image.png", "other.png")]
    media = [{"type": "image", "image": image} for image in images]
    answer = model.answer([{"role": "user", "content": [*media, QUESTION]}], **LIMITS)
    assert list(masks) == answer.names == ["1", "2", "3"]
    for number, (image, frame) in enumerate(zip(images, answer.frames(), strict=True)):
        drawn = model.drawer.draw(image, answer.vectors)
        assert frame.index == number
        assert frame.masks.any()
        for name, mask, theirs in zip(answer.names, frame.masks, drawn.masks, strict=True):
            assert (masks[name][str(number)] == mask).all()
            assert (mask == theirs).all()
    with pytest.raises(vl3.InputError, match="differ in size"):
        _ = answer.masks
    entry = ask("--image", "image.png")["masks"]["1"]["0"]
    assert entry.keys() == {"size", "counts", "score", "object_score"}
    assert entry["size"] == [HEIGHT, WIDTH]


@pytest.mark.slow
def test_a_video(ask, model):
    """The frames that the model saw, by their index in the video: the first five are drawn, the others tracked."""
    answer = ask("--video", VIDEO, "--start", 2, "--fps", 2, question="What is it?")
    (shown,) = answer["frames"]
    assert len(shown["indices"]) > 5
    masks = decoded(answer["masks"])
    assert {tuple(frames) for frames in masks.values()} == {tuple(map(str, shown["indices"]))}
    content = [{"type": "video", "video": VIDEO, "start": 2, "fps": 2}, "What is it?"]
    result = model.submit([{"role": "user", "content": content}], **LIMITS).result()
    video = VideoFrames(open_video(VIDEO))
    frames = [video[index] for index in shown["indices"]]
    for index, frame in zip(shown["indices"], model.drawer.track(frames, result.vectors, range(5)), strict=True):
        for name, mask in zip(masks, frame.masks, strict=True):
            assert (masks[name][str(index)] == mask).all()
    click = Prompt(frame=shown["indices"][7], obj=1, points=[(10, 10, 0)], correction=True)
    plain, corrected = (list(result.frames(clicks)) for clicks in ((), [click]))
    assert (plain[6].logits == corrected[6].logits).all()
    assert (plain[7].logits != corrected[7].logits).any()
    with pytest.raises(vl3.InputError, match="which the model has not seen"):
        list(result.frames([dataclasses.replace(click, frame=click.frame + 1)]))


def test_a_pipe_is_read_once(ask, folder):
    output, pipe = os.pipe()
    content = (folder / "image.png").read_bytes()

    def write():
        with open(pipe, "wb") as file:
            file.write(content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        masks = ask("--image", f"/dev/fd/{output}")["masks"]
    finally:
        writer.join()
        os.close(output)
    assert masks == ask("--image", "image.png")["masks"]


def test_without_objects_or_without_one_thing_to_draw_in(ask, folder, monkeypatch):
    several = "--image", "image.png", "--video", VIDEO, "--start", 2, "--max-visual-tokens", 40
    answer = ask(*several)
    assert "masks" not in answer
    assert "the answer names 3 objects, which are not drawn: objects are drawn in images or in one" in answer["stderr"]
    silent = vl3.load(folder / "vl3")
    monkeypatch.setattr("vl3_jax.cli.generation_flags.load_model", lambda arguments: silent)
    answer = ask("--image", "image.png")
    assert ("masks" in answer, answer["stderr"]) == (False, "")
