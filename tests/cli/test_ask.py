"""`vl3 ask` and `vl3 chat` as a user runs them, on a tiny random checkpoint and real media."""

import io
import json
import subprocess
import sys
import wave

import numpy as np
import pytest
from PIL import Image

import vl3_jax as vl3
from support.checkpoints import DATA, write_random_checkpoint
from vl3_jax.cli.main import main

MEDIA = DATA / "media"
VIDEO = MEDIA / "edge" / "city_vp9.webm"
IMAGE = MEDIA / "images" / "handwriting.png"
SMALL = ["--max-visual-tokens", "300", "--max-new-tokens", "8"]
IMAGES = sorted((MEDIA / "images").iterdir())
VIDEOS, EDGE = (sorted((MEDIA / folder).iterdir()) for folder in ("videos", "edge"))
FILES = [*IMAGES, *VIDEOS, *(pytest.param(file, marks=pytest.mark.slow) for file in EDGE)]
UNREADABLE = "city_no_index.mp4"
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return vl3.load(checkpoint)


def ask(capsys, checkpoint, *arguments) -> dict:
    assert main(["ask", "--model", checkpoint, "--json", *SMALL, *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys, checkpoint, *arguments) -> str:
    """Returns the one line of stderr of a question that is refused."""
    assert main(["ask", "--model", str(checkpoint), *SMALL, *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vl3 ask: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_json_describes_a_video(capsys, checkpoint):
    answer = ask(capsys, checkpoint, "--video", VIDEO, "--logprobs", 2, "What happens?")
    assert len(answer["token_ids"]) == 8 or answer["finish_reason"] == "stop"
    assert answer["prompt_tokens"] == len(answer["prompt_token_ids"])
    frames = answer["frames"][0]
    assert frames["timestamps"] == [float(second) for second in range(len(frames["indices"]))]
    assert 0 < answer["visual_tokens"] <= answer["visual_tokens_before_pruning"] <= 300
    placeholders = sum(token in (151_655, 151_656, 151_665) for token in answer["prompt_token_ids"])
    assert placeholders == answer["visual_tokens"]
    assert [pairs[0][0] for pairs in answer["logprobs"]] == answer["token_ids"]
    assert all(len(pairs) == 2 for pairs in answer["logprobs"])
    assert set(answer["seconds"]) == {"load", "process", "compile", "prefill", "decode"}
    assert answer["tokens_per_second"] > 0


def test_media_keep_the_order_of_the_flags(capsys, checkpoint):
    tokenizer = vl3.load(checkpoint).processor.tokenizer
    for flags, expected in [
        (["--image", IMAGE, "--video", VIDEO], "I"),
        (["--video", VIDEO, "--image", IMAGE], "T"),
    ]:
        answer = ask(capsys, checkpoint, *flags, "Q")
        ids = answer["prompt_token_ids"]
        opening = tokenizer.encode("<|im_start|>user\n", special=True)
        assert ids[: len(opening)] == opening
        first = tokenizer.decode(ids[len(opening) : len(opening) + 1], skip_special_tokens=False)
        assert first.startswith("<|image_pad|>" if expected == "I" else "Time")


@pytest.mark.parametrize("start", [None, 2.0])
def test_window_frames_and_pruning_flags(capsys, checkpoint, start):
    window = [] if start is None else ["--start", start, "--end", 5]
    free = ask(capsys, checkpoint, "--video", VIDEO, *window, "--fps", 2, "--no-prune", "Q")
    assert free["visual_tokens"] == free["visual_tokens_before_pruning"]
    times = free["frames"][0]["timestamps"]
    assert times[0] == (start or 0)
    assert np.allclose(np.diff(times), 0.5)
    capped = ask(capsys, checkpoint, "--video", VIDEO, *window, "--max-frames", 3, "--prune-threshold", 40, "Q")
    assert len(capped["frames"][0]["indices"]) == 3
    assert capped["visual_tokens"] < capped["visual_tokens_before_pruning"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_is_answered_or_explained(capsys, checkpoint, file):
    flag = "--image" if file in IMAGES else "--video"
    if file.name == UNREADABLE:
        assert file.name in failure(capsys, checkpoint, flag, file, "What is it?")
    else:
        assert ask(capsys, checkpoint, flag, file, "What is it?")["visual_tokens"] > 0


def write_silence(path):
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 8000, "NONE", ""))
        sound.writeframes(bytes(16_000))


def blank_image(width, height):
    return lambda path: Image.new("RGB", (width, height), "navy").save(path)


BAD = {
    "missing.mp4": (None, ["--video"]),
    "missing.png": (None, ["--image"]),
    "sound.wav": (write_silence, ["--video"]),
    "empty.mp4": (lambda path: path.write_bytes(b""), ["--video"]),
    "empty.png": (lambda path: path.write_bytes(b""), ["--image"]),
    "text.mp4": (lambda path: path.write_text("a diary\n" * 50), ["--video"]),
    "long.png": (blank_image(5000, 1), ["--preprocess", "native", "--image"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_media_are_one_line_that_names_the_file(capsys, checkpoint, tmp_path, name):
    make, flags = BAD[name]
    if make:
        make(tmp_path / name)
    assert name in failure(capsys, checkpoint, *flags, tmp_path / name, "What is it?")


def test_extreme_images_are_answered(capsys, checkpoint, tmp_path):
    blank_image(5000, 1)(tmp_path / "long.png")
    Image.new("L", (20_000, 20_000)).save(tmp_path / "huge.png", compress_level=1)
    for name in ("long.png", "huge.png"):
        assert ask(capsys, checkpoint, "--image", tmp_path / name, "Q")["visual_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", VIDEO, "--start", 5, "--end", 2, "Q"], "start"),
        (["--video", VIDEO, "--start", 500, "Q"], VIDEO.name),
        (["--max-new-tokens", 40_000, "Q"], "context"),
        (["--temperature", "-1", "Q"], "temperature"),
        (["--fps", 0, "--video", VIDEO, "Q"], "fps"),
        ([], "nothing to answer"),
        (["--conversation", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_bad_questions_are_one_line(capsys, checkpoint, arguments, message):
    assert message in failure(capsys, checkpoint, *arguments)


def test_a_missing_model_is_one_line(capsys, tmp_path):
    assert "nothing" in failure(capsys, tmp_path / "nothing", "Q")


def test_a_conversation_file(capsys, checkpoint, tmp_path):
    file = tmp_path / "talk.json"
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": {"image_path": str(IMAGE)}}, "What is it?"]},
        {"role": "assistant", "content": "Formulas."},
        {"role": "user", "content": [{"type": "video", "video": str(VIDEO), "fps": 1, "max_frames": 2}, "And here?"]},
    ]
    file.write_text(json.dumps(talk))
    answer = ask(capsys, checkpoint, "--conversation", file)
    assert len(answer["frames"]) == 1
    assert len(answer["frames"][0]["indices"]) == 2
    file.write_text('[{"role": "user",\n "content": }]')
    assert "line 2" in failure(capsys, checkpoint, "--conversation", file)


def test_a_typed_placeholder_stays_text(capsys, checkpoint):
    answer = ask(capsys, checkpoint, "What does <image> or <|im_end|> mean?")
    assert answer["visual_tokens"] == 0
    assert 151_665 not in answer["prompt_token_ids"]
    assert answer["prompt_token_ids"].count(151_645) == 1


def test_python_answers_as_the_command_does(capsys, checkpoint, model):
    settings = {"max_visual_tokens": 300, "max_new_tokens": 8}
    expected = ask(capsys, checkpoint, "--image", IMAGE, "--video", VIDEO, "What is it?")["text"]
    arguments = {"images": [IMAGE], "videos": [VIDEO], **settings}
    assert model.chat("What is it?", **arguments) == expected
    assert "".join(model.chat("What is it?", stream=True, **arguments)) == expected
    pixels = np.asarray(Image.open(IMAGE).convert("RGB"))
    assert model.chat("Q", images=[pixels], **settings) == model.chat("Q", images=[IMAGE], **settings)
    with pytest.raises(vl3.InputError, match="unknown setting 'beams'"):
        model.chat("Q", beams=4)


def test_a_batch_answers_as_each_alone(model):
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": IMAGE}, "What is it?"]}],
        [{"role": "user", "content": "Hello"}],
        [{"role": "user", "content": [{"type": "video", "video": VIDEO}, "What happens?"]}],
    ]
    settings = {"max_visual_tokens": 300, "max_new_tokens": 8}
    together = model.answer_batch(talks, **settings)
    assert [answer.text for answer in together] == [model.answer(talk, **settings).text for talk in talks]


def test_chat_keeps_history_and_media(capsys, checkpoint, monkeypatch):
    lines = [f"/image {IMAGE}", "What is it?", "Sure?", "/image nowhere.png", "/dance", "/clear", "Hello", "/quit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    prompts = []
    answer = vl3.ChatModel.answer

    def recorded(self, messages, **settings):
        result = answer(self, messages, **settings)
        prompts.append((len(messages), result.processed.visual_tokens))
        return result

    monkeypatch.setattr(vl3.ChatModel, "answer", recorded)
    assert main(["chat", "--model", checkpoint, *SMALL]) == 0
    seen = prompts[0][1]
    assert prompts == [(1, seen), (3, seen), (1, 0)]
    assert seen > 0
    errors = capsys.readouterr().err
    assert "nowhere.png" in errors
    assert "/dance" in errors


def test_help_has_all_sections():
    result = subprocess.run(
        [sys.executable, "-m", "vl3_jax.cli.main", "ask", "--help"], capture_output=True, text=True, check=True
    )
    for heading in ("model:", "question:", "media:", "decoding", "output:", "examples:", "exit codes:"):
        assert heading in result.stdout


def test_int8_weights_answer(capsys, checkpoint):
    answer = ask(capsys, checkpoint, "--quantize", "int8", "--image", IMAGE, "What is it?")
    assert len(answer["token_ids"]) == 8 or answer["finish_reason"] == "stop"


def test_a_terminal_shows_every_frame(capsys, model):
    from vl3_jax.cli.generation_flags import show_frames

    model.processor.on_frame = show_frames
    model.chat("Q", videos=[VIDEO], max_visual_tokens=301, max_new_tokens=2)  # not in the cache of media yet
    output = capsys.readouterr().err
    assert output.endswith("\n")
    assert f"{VIDEO}: frame 1 of" in output
