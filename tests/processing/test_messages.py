"""Conversations in every form that people write them, and what is refused: nothing in a message is ignored."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl3_jax.errors import InputError
from vl3_jax.processing.messages import MediaPart, Turn, parse_messages

VIDEO = {"type": "video", "video": "a.mp4"}
IMAGE = {"type": "image", "image": "a.png"}
FRAMES = [np.zeros((2, 2, 3), np.uint8)] * 2


def user(*content):
    return {"role": "user", "content": list(content)}


def parsed(part):
    return parse_messages([user(part)])[0].parts[0]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "a.mp4", "fps": 2, "max_frames": 64, "start": 1, "end": 5.5},
        {
            "type": "video",
            "video": {"video_path": "a.mp4", "fps": 2, "max_frames": 64, "start_time": 1, "end_time": 5.5},
        },
        {"video": {"video_path": "a.mp4", "fps": "2", "max_frames": 64.0}, "start": 1, "end": 5.5, "timestamps": None},
        {"type": "video_url", "video_url": {"url": "a.mp4"}, "fps": 2, "max_frames": 64, "start": 1, "end": 5.5},
        {"type": "video", "url": "a.mp4", "fps": 2, "max_frames": 64, "start": 1, "end": 5.5},
        {"type": "video", "path": "a.mp4", "fps": 2, "max_frames": 64, "start": 1, "end": 5.5},
        {"video_url": "a.mp4", "fps": 2, "max_frames": 64, "start": 1, "end": 5.5},
    ],
)
def test_all_forms_of_a_video_part_parse_to_the_same_turn(part):
    options = {"fps": 2.0, "max_frames": 64, "start": 1.0, "end": 5.5}
    assert parsed(part) == MediaPart("video", "a.mp4", options)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"image": {"image_path": "a.png"}},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "image": {"url": "a.png"}},
    ],
)
@pytest.mark.parametrize("time", [{}, {"time": 3}, {"timestamp": 3.0}, {"timestamps": [3.0]}, {"time": "3"}])
def test_all_forms_of_an_image_part_parse_to_the_same_turn(part, time):
    assert parsed({**part, **time}) == MediaPart("image", "a.png", {}, 3.0 if time else None)


def test_other_forms():
    assert parsed({"type": "image", "base64": "iVBO"}).source == "data:;base64,iVBO"
    timed = MediaPart("video", FRAMES, {"timestamps": [0.0, 1.5]})
    assert parsed({"video": FRAMES, "timestamps": (0, 1.5), "num_frames": 2}) == timed
    assert parsed({"video": FRAMES, "timestamps": np.array([0, 1.5])}) == timed
    assert parsed({"type": "video", "video": "a.mp4", "precise_time": True}).options == {"precise_time": True}
    assert parsed({"text": "caf\u00e9 \U0001f600"}) == parsed("caf\u00e9 \U0001f600")
    turns = parse_messages([user("a", IMAGE), {"role": "system", "content": IMAGE}])
    assert parse_messages(turns) == turns
    assert turns[1] == Turn("system", [MediaPart("image", "a.png")])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "a conversation is a list of messages"),
        ([{"role": "user"}], 'message 1: needs "role" and "content"'),
        ([user("a"), {"role": "tool", "content": "b"}], "message 2: unknown role 'tool'"),
        ([{**user("a"), "name": "me"}], "message 1: unknown key 'name'; known are role, content"),
        ([user("a", {"type": "audio", "audio": "b"})], "message 1, part 2: unknown type 'audio'"),
        ([user({"type": ["image"], "image": "b"})], "unknown type"),
        ([user({"type": "video"})], 'a video without "video" or "url" or "path"'),
        ([user({"type": "video", "video": {"file": "a"}})], 'without "video_path"'),
        ([user({**IMAGE, "url": "b.png"})], "both image and url name the image"),
        ([user({"image": {"image_path": "a", "path": "b"}})], "both image_path and path"),
        ([user({**VIDEO, "max_frame": 3})], "unknown key 'max_frame'; known are fps, max_frames"),
        ([user({**VIDEO, 7: 3})], "unknown key 7"),
        ([user({**IMAGE, "fps": 1})], "unknown key 'fps'"),
        ([user({"type": "text", "text": "a", "image": "b.png"})], "unknown key 'image'; known are text"),
        ([user({"image_url": {"url": "a.png", "detail": "high"}})], "unknown key 'detail'"),
        ([user({**VIDEO, "start": 1, "start_time": 2})], "start_time sets start, which is given twice"),
        ([user({"video": {"video_path": "a", "fps": 1}, "fps": 2})], "fps is given twice|which is given twice"),
        ([user({**IMAGE, "time": 1, "timestamps": [2]})], "given twice"),
        ([user({**VIDEO, "num_frames": 3})], "use max_frames or fps"),
        ([user({"video": FRAMES, "num_frames": 3})], "num_frames is 3, but there are 2 frames"),
        ([user({**IMAGE, "num_frames": 2})], "there are 1 frames"),
        ([user({**VIDEO, "fps": "fast"})], "fps is 'fast'; give a number"),
        ([user({**VIDEO, "fps": True})], "fps is True; give a number"),
        ([user({**VIDEO, "max_frames": 2.5})], "max_frames is 2.5; give a whole number"),
        ([user({**VIDEO, "max_frames": 0})], "max_frames is 0; give a whole number from 1"),
        ([user({**VIDEO, "fps": 0})], "fps is 0; give a number from 1e-06 up to 1000"),
        ([user({**VIDEO, "end_time": -1})], "end_time is -1; give a number from 0"),
        ([user({**VIDEO, "max_frames": 10**400})], "max_frames is 1000"),
        ([user({**VIDEO, "fps": 10**5000})], "fps is a huge int; give a number"),
        ([user({**IMAGE, "inline": 1})], "inline is 1; give true or false"),
        ([user({**VIDEO, "inserts": [["a", "b"]]})], "give pairs of a number of frames and a text"),
        ([user({**VIDEO, "inserts": [[2, "a"], [1, "b"]]})], "in ascending order, from 0"),
        ([user({**VIDEO, "precise_time": "no"})], "precise_time is 'no'; give true or false"),
        ([user({**VIDEO, "timestamps": 3})], "part 1: timestamps is 3; give a list"),
        ([user({**VIDEO, "timestamps": "123"})], "timestamps is '123'; give a list"),
        ([user({**VIDEO, "timestamps": [[1]]})], r"timestamps is \[1\]; give a number"),
        ([user("caf\udce9")], r"message 1, part 1: character 4 of the text is '\\udce9'"),
        ([user({"text": "\ud83d"})], "character 1 of the text"),
        ([user({"text": None})], "text has type NoneType"),
        ([user(3)], "part 1: has type int"),
        ([{"role": "user", "content": 3}], "content has type int"),
    ],
)
def test_what_cannot_be_applied_is_refused(messages, message):
    with pytest.raises(InputError, match=message) as error:
        parse_messages(messages)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "inf"])
@pytest.mark.parametrize("key", ["fps", "max_frames", "start", "end_time", "timestamps"])
def test_numbers_of_videos_are_finite(key, value):
    with pytest.raises(InputError, match=f"message 1, part 1: {key} is .*; give a number"):
        parsed({**VIDEO, key: [value] if key == "timestamps" else value})
    with pytest.raises(InputError, match="message 1, part 1: time is"):
        parsed({**IMAGE, "time": value})


def test_long_values_and_control_characters_are_shown_short_and_harmless():
    for message in ([{"role": "x" * 10**6, "content": ""}], [user({**VIDEO, "\x1b[2J" + "k" * 10**6: 1})]):
        with pytest.raises(InputError) as error:
            parse_messages(message)
        assert len(str(error.value)) < 500
        assert str(error.value).isprintable()


ATOMS = [None, True, 0, -1, 1.5, 10**400, math.nan, math.inf, "", "a", "caf\udce9", "1e999", b"x", "data:,x"]
KEYS = [
    "type",
    "text",
    "image",
    "video",
    "image_url",
    "url",
    "path",
    "fps",
    "start",
    "timestamps",
    "time",
    "num_frames",
]
VALUES = st.recursive(
    st.sampled_from([*ATOMS, *KEYS]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_part_is_parsed_or_refused(part):
    try:
        (result,) = parse_messages([{"role": "user", "content": [part]}])[0].parts
    except InputError as error:
        result = str(error)
        assert result.isprintable()
    if isinstance(result, str):
        result.encode()
    else:
        numbers = [result.time, *(v for v in result.options.values() if not isinstance(v, list))]
        assert all(n is None or math.isfinite(n) for n in numbers)
