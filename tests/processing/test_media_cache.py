"""The media of a prompt are decoded once, and again when a source or a setting has changed."""

import os

import numpy as np
import pytest
from PIL import Image

from support.media import TOKENIZER, write_video
from vl3_jax.processing import processor as processor_module
from vl3_jax.processing.media_cache import MediaCache
from vl3_jax.processing.media_source import MediaBytes
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.tokenizer import Tokenizer

CONFIG = ProcessorConfig(max_tokens=64)


@pytest.fixture
def ask(monkeypatch):
    """Processes a question about media; returns how many of them were opened."""
    opened, open_media, cache = [], processor_module.open_media, MediaCache()
    monkeypatch.setattr(processor_module, "open_media", lambda *args: opened.append(args) or open_media(*args))

    def process(*parts, config=CONFIG, text="Q"):
        before = len(opened)
        Processor(Tokenizer.from_folder(TOKENIZER), config, media=cache)([{"role": "user", "content": [*parts, text]}])
        return len(opened) - before

    return process


def image(path, size=(56, 56), colour="red"):
    Image.new("RGB", size, colour).save(path, "PNG")
    return {"type": "image", "image": str(path)}


def test_a_second_question_opens_nothing(ask, tmp_path):
    write_video(tmp_path / "clip.mp4", range(0, 3000, 100))
    video = {"type": "video", "video": str(tmp_path / "clip.mp4")}
    assert [ask(video), ask(video, text="Another?"), ask(video, config=ProcessorConfig(max_tokens=32))] == [1, 0, 1]
    assert ask({**video, "start": 1}) == 1
    assert ask(video, image(tmp_path / "a.png")) == 2
    assert ask(video) == 0


def test_a_file_that_changes_is_read_again(ask, tmp_path):
    part = image(tmp_path / "a.png")
    assert [ask(part), ask(part)] == [1, 0]
    image(tmp_path / "a.png", colour="blue")
    assert ask(part) == 1
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert ask({"type": "image", "image": f"file://{tmp_path}/a.png"}) == 1


def test_sources_in_memory_are_told_apart_by_content(ask, tmp_path):
    image(tmp_path / "a.png")
    data, array = (tmp_path / "a.png").read_bytes(), np.zeros((56, 56, 3), np.uint8)
    for source in (data, MediaBytes(data, "a"), array, array + 1):
        part = {"type": "image", "image": source}
        assert [ask(part), ask(part)] == [1, 0]
    assert ask({"type": "video", "video": [array, array + 1]}) == 1
    assert ask({"type": "video", "video": [array, array + 2]}) == 1


def test_what_can_be_read_only_once_is_not_kept(ask, tmp_path):
    image(tmp_path / "a.png")
    for _ in range(2):
        with open(tmp_path / "a.png", "rb") as file:
            assert ask({"type": "image", "image": file}) == 1
    assert ask(text="no media") == 0


def test_the_oldest_media_make_room(ask, tmp_path, monkeypatch):
    cache = MediaCache(most_bytes=2 * 16 * 588)
    processor = Processor(Tokenizer.from_folder(TOKENIZER), CONFIG, media=cache)
    parts = [image(tmp_path / f"{number}.png", colour=(number, 0, 0)) for number in range(3)]
    for part in parts:
        processor([{"role": "user", "content": [part]}])
    kept = [
        cache.get(cache.key(processor_module.messages.parse_messages([{"role": "user", "content": [part]}]), CONFIG))
        for part in parts
    ]
    assert [media is not None for media in kept] == [False, True, True]
