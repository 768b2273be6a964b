"""Tests the conversion of annotation records, and the errors of bad ones."""

import pytest

from data_pipelines import annotations, sample_errors
from data_pipelines.annotations import parse_conversation
from data_pipelines.record_turns import RecordTurn
from data_pipelines.sample_errors import SampleError, SampleErrorLog, TooManyBadSamplesError
from data_pipelines.sources import Record, map_record
from data_pipelines.sources.media_resolver import MediaResolver

WHERE = "a.jsonl, line 7"
ASK, ANSWER = {"from": "human", "value": "Which?"}, {"from": "gpt", "value": " That. "}


@pytest.fixture
def media(tmp_path):
    for name in ("a.png", "b.png", "a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    return MediaResolver(str(tmp_path))


def human(text):
    return {"from": "human", "value": text}


def contents(record, media):
    """Returns (role, parts) of each message, with media by their base names."""

    def shorten(part):
        return part if isinstance(part, str) else "@" + part.source.rsplit("/", 1)[1]

    return [(turn.role, [shorten(part) for part in turn.parts]) for turn in parse_conversation(record, media).turns]


def error_of(record, media):
    """Returns the error of a bad record."""
    error = map_record(Record(record, WHERE), lambda read: parse_conversation(read.fields, media))
    assert isinstance(error, SampleError)
    return error


def test_images_replace_their_tags(media):
    record = {"image": ["a.png", "b.png"], "conversations": [human("First: <image> Second:<image>\nSame?"), ANSWER]}
    expected = [("user", ["First:", "@a.png", "Second:", "@b.png", "Same?"]), ("assistant", [" That. "])]
    assert contents(record, media) == expected


def test_a_string_is_one_medium_and_without_tags_media_come_first(media):
    assert contents({"image": "a.png", "conversations": [ASK, ANSWER]}, media)[0] == ("user", ["@a.png", "Which?"])
    record = {"image": ["a.png", "b.png"], "conversations": [ASK, ANSWER]}
    assert contents(record, media)[0][1] == ["@a.png", "@b.png", "Which?"]


def test_images_and_several_videos_together(media):
    text = "<video> then <image> then <video> end"
    record = {"image": ["a.png"], "video": ["a.mp4", "b.mp4"], "conversations": [human(text), ANSWER]}
    assert contents(record, media)[0][1] == ["@a.mp4", "then", "@a.png", "then", "@b.mp4", "end"]
    record["conversations"] = [human("<image> only"), ANSWER]
    assert contents(record, media)[0][1] == ["@a.mp4", "@b.mp4", "@a.png", "only"]


@pytest.mark.parametrize("no_media", [{}, {"image": None}, {"image": []}, {"videos": None, "image": None}])
def test_text_alone(media, no_media):
    record = {**no_media, "conversations": [human(" what is vector<Image>? "), ANSWER]}
    assert contents(record, media)[0][1] == ["what is vector<Image>?"]


def test_roles(media):
    system, greeting = {"from": "system", "value": "Be brief."}, {"from": "gpt", "value": "Hello!"}
    for beginning in ([greeting, system], [system, greeting], [greeting, system, greeting]):
        conversation = parse_conversation({"conversations": [*beginning, ASK, ANSWER]}, media)
        assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant"]
        assert conversation.counts.left_out == {"assistant": len(beginning) - 1}


def test_windows_of_a_video(media):
    record = {"video": ["a.mp4"], "start_time": 1, "end_time": 2.5, "conversations": [ASK, ANSWER]}
    (part,) = parse_conversation(record, media).turns[0].media
    assert (part.options["start"], part.options["end"]) == (1.0, 2.5)


def test_a_stream_ends_with_the_frame_before_its_last_turn(media):
    turns = [
        {"role": "assistant", "content": "A pen.", "time": 24.2},
        {"role": "user", "content": "Tell me.", "time": 12.0},
    ]
    record = {"video": ["a.mp4"], "stream": True, "start_time": 12.0, "end_time": 47.0, "conversation": turns}
    conversation = parse_conversation(record, media)
    assert conversation.stream == (
        RecordTurn("user", "Tell me.", False, 12.0),
        RecordTurn("assistant", "A pen.", True, 24.2),
    )
    assert conversation.stream_start == 12.0
    assert conversation.turns[0].media[0].options["end"] == 25.0


STREAM = {"video": ["a.mp4"], "stream": True}
BAD = {
    "a list": ([1], sample_errors.BAD_RECORD),
    "no turns": ({}, sample_errors.BAD_RECORD),
    "turns as text": ({"conversations": "hi"}, sample_errors.BAD_RECORD),
    "a turn as text": ({"conversations": [ASK, "yes"]}, sample_errors.BAD_RECORD),
    "a number as text": ({"conversations": [ASK, {"from": "gpt", "value": 3}]}, sample_errors.BAD_RECORD),
    "empty": ({"conversations": []}, sample_errors.EMPTY),
    "answers only": ({"conversations": [ANSWER, ANSWER]}, sample_errors.EMPTY),
    "a question only": ({"conversations": [ASK]}, sample_errors.EMPTY),
    "no answer": ({"conversations": [ASK, ASK]}, sample_errors.EMPTY),
    "two tags": ({"image": "a.png", "conversations": [human("<image><image>"), ANSWER]}, sample_errors.TAGS),
    "one tag": ({"image": ["a.png", "b.png"], "conversations": [human("<image>"), ANSWER]}, sample_errors.TAGS),
    "missing": ({"image": "c.png", "conversations": [ASK, ANSWER]}, sample_errors.MISSING),
    "a number as file": ({"image": [3], "conversations": [ASK, ANSWER]}, sample_errors.BAD_RECORD),
    "a time as text": ({"video": "a.mp4", "start_time": "x", "conversations": [ASK, ANSWER]}, sample_errors.BAD_RECORD),
    "stream without answer": (
        {**STREAM, "conversation": [{"role": "user", "content": "a", "time": 1}]},
        sample_errors.EMPTY,
    ),
    "stream without time": (
        {**STREAM, "conversation": [{"role": "assistant", "content": "a"}]},
        sample_errors.BAD_RECORD,
    ),
    "stream role": ({**STREAM, "conversation": [{"role": "x", "content": "a", "time": 1}]}, sample_errors.BAD_RECORD),
    "two streams": (
        {**STREAM, "video": ["a.mp4", "b.mp4"], "conversation": [{"role": "assistant", "content": "a", "time": 1}]},
        sample_errors.BAD_RECORD,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_gives_its_kind_and_location(media, name):
    record, kind = BAD[name]
    error = error_of(record, media)
    assert (error.kind, error.where) == (kind, WHERE)
    assert error.message
    assert "\n" not in str(error)


def test_remote_media(tmp_path):
    import fsspec

    with fsspec.open("memory://bucket/x/a.png", "wb") as file:
        file.write(b"pixels")
    media = MediaResolver("memory://bucket/x")
    record = {"image": "a.png", "conversations": [ASK, ANSWER]}
    assert parse_conversation(record, media).turns[0].media[0].source == b"pixels"
    record["image"] = "none.png"
    error = error_of(record, media)
    assert (error.kind, error.file) == (sample_errors.MISSING, "memory://bucket/x/none.png")


def test_the_log_counts_errors_names_the_worst_files_and_stops():
    log = SampleErrorLog()
    log.add([SampleError(sample_errors.MISSING, f"a.jsonl, line {n}", "gone", "bad.png") for n in range(6)], 100)
    log.add([SampleError(sample_errors.EMPTY, "b.jsonl, line 1", "no turns", "b.jsonl")], 20)
    table = log.table()
    assert "7 of 120" in table
    assert table.splitlines()[-2].split() == ["6", "bad.png"]
    assert table.count("gone") == 3
    log.check(0.06, 100)
    log.check(0.05, 200)
    with pytest.raises(TooManyBadSamplesError, match=r"7 of 120.*5\.0%") as stopped:
        log.check(0.05, 100)
    assert stopped.value.table == table
    with pytest.raises(TooManyBadSamplesError, match="40 of 200"):
        log.check(0.05, 100, bad=40, seen=200)


def test_a_long_text_is_measured_before_it_is_tokenised(media):
    answer = {"from": "gpt", "value": "a" * annotations.MAX_CHARACTERS}
    assert error_of({"conversations": [ASK, answer]}, media).kind == sample_errors.TOO_LONG
