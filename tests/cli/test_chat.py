"""`vl3 chat` with the real processor and a model that says how much it saw: names of files, turns that fail or stop."""

import io
import sys
import types

import pytest
from PIL import Image

from support.media import MEDIA, TOKENIZER, write_video
from vl3_jax.cli import chat, generation_flags
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError
from vl3_jax.inference.chat_model import ChatModel
from vl3_jax.inference.generation_config import GenerationConfig
from vl3_jax.processing import remote_media
from vl3_jax.processing.media_source import MediaBytes
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.tokenizer import Tokenizer

TEXT = types.SimpleNamespace(vocab_size=151_668, max_position_embeddings=32_768)
NAMES = ["a.png", "my pic.png", "it's.png", 'say "x".png', "back\\slash.png", "10:22:33.png", "caf\u00e9.png"]


class CountingModel(ChatModel):
    """Answers with the number of messages and of vision tokens of the prompt."""

    def answer(self, messages, *, on_text=None, **settings):
        processed = self.process(messages, **settings)
        last = messages[-1]["content"][-1]["text"]
        if last == "fail":
            raise InputError("the question fails")
        if last == "stop":
            raise KeyboardInterrupt
        answer = f"{len(messages)} messages, {processed.visual_tokens} tokens"
        on_text(answer)
        return types.SimpleNamespace(text=answer, processed=processed, warnings=processed.warnings)


@pytest.fixture(scope="module")
def model():
    engine = types.SimpleNamespace(model=types.SimpleNamespace(config=types.SimpleNamespace(text=TEXT)))
    return CountingModel(engine, Processor(Tokenizer.from_folder(TOKENIZER)), GenerationConfig(()))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in NAMES:
        Image.new("RGB", (56, 56)).save(tmp_path / name, "PNG")
    whole = (MEDIA / "images" / "huckleberry_page.jpg").read_bytes()
    (tmp_path / "trunc.jpg").write_bytes(whole[: len(whole) // 2])
    write_video(tmp_path / "clip.mp4", range(0, 3000, 100))
    return tmp_path


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """Holds a conversation of these lines; returns what is printed, and the lines of errors."""

    def held(*lines, flags=(), code=0):
        monkeypatch.setattr(generation_flags, "load_model", lambda arguments: model)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", "--model", "M", *flags]) == code
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err.splitlines()

    return held


@pytest.mark.parametrize(
    "written",
    [
        *NAMES,
        *("~/a.png", "'my pic.png'", '"my pic.png"', "my\\ pic.png", "~/my\\ pic.png", "it\\'s.png", '"it\'s.png"'),
        *("back\\\\slash.png", "~/10:22:33.png", "'~/a.png'", "  a.png  ", "file://{}/my%20pic.png"),
    ],
)
def test_files_as_people_write_them(folder, talk, written):
    out, errors = talk(f"/image {written.format(folder)}", "Q")
    assert (out[-1], errors) == ("1 messages, 16 tokens", [])


@pytest.mark.parametrize(
    "written", ["", "nothing.png", "'a.png", "a.png my pic.png", "~nobody/a.png", "https://a.b/c.png"]
)
def test_files_that_are_not_there(folder, talk, written):
    out, errors = talk(f"/image {written}", "Q")
    assert out == ["1 messages, 0 tokens"]
    assert [error.startswith("vl3 chat: ") for error in errors] == [True]


def test_a_damaged_image_stays_out_of_the_conversation(folder, talk):
    out, errors = talk("/image trunc.jpg", "What is it?", "/image a.png", "And this?")
    assert out[0] == "1 messages, 0 tokens"
    assert out[-1] == "3 messages, 16 tokens"
    assert len(errors) == 1
    assert "trunc.jpg" in errors[0]


def test_a_medium_that_turns_out_unreadable_is_left_out(folder, talk):
    out, errors = talk("/image a.png", "/video clip.mp4", "What?", "What?", flags=["--start", "9"])
    assert out[2:] == ["(clip.mp4 is no longer attached)", "1 messages, 16 tokens"]
    assert len(errors) == 1


def test_a_turn_that_fails_leaves_history_and_media(folder, talk):
    out, errors = talk("Hello", "/image a.png", "fail", "What?", "Again?")
    assert out == [
        "1 messages, 0 tokens",
        "(a.png is attached to the next question)",
        "3 messages, 16 tokens",
        "5 messages, 16 tokens",
    ]
    assert errors == ["vl3 chat: the question fails"]


def test_a_turn_that_is_stopped_leaves_history_and_media(folder, model):
    session = chat.ChatSession(model, None, {})
    session.handle("/image a.png")
    before = dict(vars(session), _media=list(session._media))
    with pytest.raises(KeyboardInterrupt):
        session.handle("stop")
    assert vars(session) == before


def test_ctrl_c_without_a_terminal_ends_the_conversation(talk):
    out, errors = talk("Hello", "stop", "never", code=130)
    assert (out, errors) == (["1 messages, 0 tokens"], ["vl3 chat: stopped"])


def test_bytes_that_are_no_text_are_one_line(talk):
    out, errors = talk("caf\udce9", "Hello")
    assert out == ["1 messages, 0 tokens"]
    assert "character 4 of the text" in errors[0]


def test_remote_media_are_fetched_once(folder, talk, monkeypatch):
    addresses = []

    def fetch(url, policy):
        addresses.append(url)
        return MediaBytes((folder / "a.png").read_bytes(), url)

    monkeypatch.setattr(remote_media, "fetch", fetch)
    out, errors = talk("/image https://example.org/a.png", "Q", "Q", flags=["--allow-remote"])
    assert (out[1:], errors) == (["1 messages, 16 tokens", "3 messages, 16 tokens"], [])
    assert addresses == ["https://example.org/a.png"]
