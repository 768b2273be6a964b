"""`ChatModel` without its model: what reaches the processor, and what is refused before anything slow."""

import math
import time
import types

import numpy as np
import pytest
from PIL import Image

from support.media import MEDIA, TOKENIZER
from vl3_jax.errors import InputError, SettingError
from vl3_jax.inference import chat_model
from vl3_jax.inference.chat_model import ChatModel, conversation
from vl3_jax.inference.generation_config import GenerationConfig
from vl3_jax.processing.media_source import MediaBytes
from vl3_jax.processing.messages import MediaPart
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.tokenizer import Tokenizer

IMAGE, VIDEO = str(MEDIA / "images" / "handwriting.png"), str(MEDIA / "edge" / "city_vp9.webm")
FRAMES = np.zeros((6, 28, 28, 3), np.uint8)
TEXT = types.SimpleNamespace(vocab_size=151_668, max_position_embeddings=32_768)


@pytest.fixture(scope="module")
def model():
    engine = types.SimpleNamespace(model=types.SimpleNamespace(config=types.SimpleNamespace(text=TEXT)))
    return ChatModel(engine, Processor(Tokenizer.from_folder(TOKENIZER)), GenerationConfig(()))


def process(model, messages, **settings):
    resolved = model.resolve(**settings)
    return model.read(messages, resolved), resolved


def video(source, **options):
    return [{"role": "user", "content": [{"type": "video", "video": source, **options}, "Q"]}]


@pytest.mark.parametrize("one", [IMAGE, MEDIA / "images" / "handwriting.png", b"bytes", FRAMES[0], MediaBytes(b"", "")])
def test_one_medium_needs_no_list(one):
    image, video = Image.new("RGB", (4, 4)), FRAMES
    for media in ([one], (one,), one):
        assert [part.get("image") is one for part in conversation("Q", images=media)[0]["content"]] == [True, False]
    for images, videos, count in [
        (image, (), 1),
        ((), video, 1),
        (FRAMES, (), 6),  # a batch of images
        ((), [FRAMES, FRAMES], 2),
        ((path for path in [IMAGE, IMAGE]), VIDEO, 3),
    ]:
        assert len(conversation("Q", images=images, videos=videos)[0]["content"]) == count + 1


def test_no_conversations_give_no_answers(model):
    assert model.answer_batch([]) == []
    with pytest.raises(InputError, match="unknown setting 'beams'"):
        model.answer_batch([], beams=4)


@pytest.mark.parametrize("extra", [{"question": "Q"}, {"images": [IMAGE]}, {"videos": VIDEO}, {"system": "S"}])
def test_messages_stand_alone(model, extra):
    with pytest.raises(InputError, match="leave the others out"):
        model.chat(messages=video(VIDEO), **extra)


@pytest.mark.parametrize(
    "source", [VIDEO, f"file://{VIDEO}", {"video_path": VIDEO}, {"video_path": VIDEO, "start_time": 2, "end_time": 5}]
)
def test_a_window_of_a_part_wins_over_the_settings(model, source):
    own = isinstance(source, dict) and "start_time" in source
    processed, _ = process(model, video(source), start=3.0, end=6.0, max_visual_tokens=300)
    assert processed.videos[0].timestamps[0] == (2.0 if own else 3.0)
    assert processed.videos[0].timestamps[-1] <= (5.0 if own else 6.0)
    processed, _ = process(model, video(VIDEO, max_frames=2), max_frames=3, fps=4, max_visual_tokens=300)
    assert len(processed.videos[0].indices) == 2


def test_settings_apply_to_frames_in_memory_or_are_refused(model):
    processed, _ = process(model, video(list(FRAMES)), max_frames=3)
    assert processed.videos[0].indices == [0, 2, 5]
    assert process(model, video(FRAMES, max_frames=2), max_frames=3)[0].videos[0].indices == [0, 5]
    for name in ("fps", "start", "end"):
        with pytest.raises(InputError, match=f"{name} does not apply"):
            process(model, video(FRAMES), **{name: 1.0})


@pytest.mark.parametrize(
    "text", ["a" * 50_000_000, " " * 50_000_000, "\u65e5" * 20_000_000], ids=["a", "space", "kanji"]
)
def test_text_is_measured_before_it_is_tokenised(model, text):
    started = time.process_time()
    with pytest.raises(InputError, match=r"characters of text exceed the context of 32768 tokens"):
        process(model, [{"role": "user", "content": ["What?", text]}])
    assert time.process_time() - started < 5
    assert len(process(model, [{"role": "user", "content": "word " * 30_000}])[0].sample.tokens) > 30_000


def test_remote_media_are_fetched_only_where_asked_for(model, monkeypatch):
    fetched = []

    def fetch(source, policy):
        fetched.append((source, policy))
        return VIDEO

    monkeypatch.setattr(chat_model, "fetched", fetch)
    process(model, video("https://example.org/a.mp4"), max_visual_tokens=300, allow_remote=True)
    process(model, video("https://example.org/a.mp4"), max_visual_tokens=300)
    assert [(source, policy is not None) for source, policy in fetched] == [
        ("https://example.org/a.mp4", True),
        ("https://example.org/a.mp4", False),
    ]
    monkeypatch.undo()
    for messages in (video("https://example.org/a.mp4"), video(["https://example.org/a.png"])):
        with pytest.raises(InputError, match="allow it with --allow-remote"):
            process(model, messages)


def test_the_vocabulary_limits_logprobs(model):
    with pytest.raises(SettingError, match=r"^logprobs is 999999; the model has 151668 tokens"):
        process(model, video(VIDEO), logprobs=999_999)
    with pytest.raises(InputError, match="leave one of them out"):
        process(model, video(VIDEO), prune=False, prune_threshold=0.2)


def test_turns_keep_what_they_are(model):
    (turn,) = model._prepare(video(VIDEO, fps=2), types.SimpleNamespace(video={"start": 1.0}, allow_remote=False))
    assert turn.parts == [MediaPart("video", VIDEO, {"start": 1.0, "fps": 2.0}), "Q"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"repetition_penalty": NaN}', "repetition_penalty is nan"),
        ('{"repetition_penalty": 1e999}', "repetition_penalty is inf"),
        ('{"repetition_penalty": 0}', "repetition_penalty is 0; expected a number from 0.001 to 1000"),
        ('{"repetition_penalty": "x"}', "repetition_penalty is 'x'"),
        ('{"eos_token_id": -1}', "eos_token_id is -1; expected integers from 0"),
        ('{"eos_token_id": [1, true]}', r"eos_token_id is \[1, True\]"),
        ('{"eos_token_id": 3000000000}', "eos_token_id is 3000000000"),
        ('{"eos_token_id": "a\\u001b"}', r"eos_token_id is 'a\\x1b'"),
        ("[" * 100_000, "correct the file"),
        ("[]", "correct the file"),
    ],
)
def test_generation_settings_of_a_checkpoint_are_checked(tmp_path, content, message):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        GenerationConfig.read(tmp_path, [7])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_read(tmp_path, encoding):
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.5, "eos_token_id": [3]}', encoding)
    config = GenerationConfig.read(tmp_path, [7])
    assert (config.stop_ids, math.isclose(config.repetition_penalty, 1.5)) == ((3, 7), True)
