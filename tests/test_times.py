"""`vl3_jax.times`: the forms in which models and data sets write times; what is written is read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vl3_jax as vl3
from vl3_jax.times import FORMS, Span, clock, draw, format, parse, parse_all

# Text and its spans, each as the named model or data set has it.
GOLDEN = [
    # VideoLLaMA3 on Charades-STA, and nano.
    ("From 2.0 to 8.0 seconds.", [(2, 8)]),
    ("3.0-7.0 s", [(3, 7)]),
    ("3.0 - 9.0", [(3, 9)]),
    ("24.3s to 30.4s", [(24.3, 30.4)]),
    # Charades-STA, charades_sta_test.txt.
    ("3MSZA 24.3 30.4##person turn a light on.", [(24.3, 30.4)]),
    # ActivityNet Captions, val_1.json.
    ('"timestamps": [[0.28, 55.15], [13.79, 54.32]]', [(0.28, 55.15), (13.79, 54.32)]),
    # QVHighlights, highlight_val_release.jsonl.
    ('"relevant_windows": [[82, 150]]', [(82, 150)]),
    # TimeChat, TimeIT: grounding and dense captions.
    ("The given query happens in 24.3 - 30.4 seconds.", [(24.3, 30.4)]),
    ("90.0 - 102.0 seconds, spread butter. 114.0 - 127.0 seconds, add cheese.", [(90, 102), (114, 127)]),
    # TimeLens: "The event happens in <start time> - <end time> seconds".
    ("The event happens in 5.5 - 9 seconds", [(5.5, 9)]),
    # Qwen2.5-VL, cookbook of video understanding: mm:ss.ff.
    ('{"start_time": "00:03.50", "end_time": "01:05.00", "description": "x"}', [(3.5, 65)]),
    # Qwen3-VL, cookbook of video understanding.
    ('```json\n{\n  "start": 3.5,\n  "end": 9\n}\n```', [(3.5, 9)]),
    # Gemini, video understanding: mm:ss.
    ("At 01:05 the dog barks, and again at 1:02:03.", [(65, 65), (3723, 3723)]),
    # WebVTT and SubRip.
    ("00:00:01.000 --> 00:00:03.500", [(1, 3.5)]),
    ("00:01:00,250 --> 00:01:02,000", [(60.25, 62)]),
    # TimeMarker and others in words.
    ("The event starts at 24.3 seconds and ends at 30.4 seconds.", [(24.3, 30.4)]),
    ("between 3 and 5 seconds", [(3, 5)]),
    ("It begins at 12 s.", [(12, 12)]),
    ("from 1 minute and 5 seconds to 2 minutes", [(65, 120)]),
    ("5-10 minutes", [(300, 600)]),
    ("1h2m3s", [(3723, 3723)]),
    ("0:05–0:10", [(5, 10)]),
    ("(2.5, 7)", [(2.5, 7)]),
    # Vid2Seq-like and LITA's ends in the other order.
    ("from 8 to 2 s", [(2, 8)]),
]


@pytest.mark.parametrize(("text", "expected"), GOLDEN)
def test_the_forms_of_models_and_data(text, expected):
    assert [(span.start, span.end) for span in parse_all(text)] == [pytest.approx(pair) for pair in expected]


def test_numbers_without_a_unit_may_count_something_else():
    # VTimeLLM counts hundredths of the video; others count frames.
    assert parse("From 00 to 32.", unit=50 / 100) == Span(0, 16)
    assert parse("from 10 to 20", unit=1 / 2) == Span(5, 10)
    assert parse("from 10 to 20 seconds", unit=1 / 2) == Span(10, 20)


@pytest.mark.parametrize(
    "text", ["", "never", "There are 3 people of 1.80 m.", "1, 2 and 3", "2024-11-26", "1:2:3:4:5"]
)
def test_what_is_malformed_is_no_time(text):
    assert parse_all(text) == []
    with pytest.raises(ValueError, match="found 0"):
        parse(text)


PIECES = [
    "[",
    "]",
    ",",
    ":",
    ".",
    "-",
    " ",
    " to ",
    "between ",
    "and ",
    "start: ",
    "end: ",
    "s",
    " min",
    "h",
    '"',
    "##",
]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.sampled_from(["1", "05", "9" * 400, "59.9", "a"])), max_size=30))
def test_any_text_is_read(pieces):
    assert all(isinstance(span, Span) for span in parse_all("".join(pieces)))


def test_one_time_is_one_time():
    assert parse("12.5") == Span(12.5, 12.5)
    assert parse("12.5").is_moment
    assert vl3.times.parse("3.0-7.0 s").duration == 4
    with pytest.raises(ValueError, match="found 2"):
        parse("at 3 s and at 5 s")
    with pytest.raises(ValueError, match="not below 0"):
        Span(-1, 2)


@pytest.mark.parametrize("form", FORMS)
@given(
    ends=st.lists(
        st.tuples(st.floats(0, 30000), st.floats(0, 30000)).filter(lambda ends: abs(ends[0] - ends[1]) > 2),
        min_size=1,
        max_size=3,
    ),
    moment=st.booleans(),
)
def test_what_is_written_is_read(form, ends, moment):
    half_step = {"seconds": 0.05, "words": 0.05, "clock": 0.5, "vtt": 5e-4, "list": 5e-3, "json": 5e-3}[form]
    spans = [Span(start, start if moment else end) for start, end in ends]
    read = parse_all(format(spans, form))
    for one, other in zip(read, spans, strict=True):
        assert np.allclose((one.start, one.end), (other.start, other.end), rtol=0, atol=half_step + 1e-6)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "00:00"), (59.6, "01:00"), (65, "01:05"), (3599.9, "01:00:00"), (7265, "02:01:05")]
)
def test_clock(seconds, expected):
    assert clock(seconds) == expected


def test_clock_with_fractions_and_hours():
    assert clock(65.25, decimals=2) == "01:05.25"
    assert clock(65, longest=3600) == "00:01:05"
    assert clock(59.999, decimals=2) == "01:00.00"


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="'frames'"):
        format(Span(1, 2), "frames")


def test_iou():
    assert Span(0, 10).iou(Span(5, 15)) == pytest.approx(1 / 3)
    assert Span(0, 1).iou(Span(2, 3)) == 0
    assert Span(1, 1).iou(Span(1, 1)) == 0


def test_a_timeline_shows_the_spans():
    image = np.asarray(draw([Span(25, 50), Span(90, 90)], duration=100, size=(401, 40)))
    blue = (image[5] == image[5, 150]).all(-1)
    assert blue[100:200].all()
    assert blue[360]
    assert not blue[:99].any()
    assert not blue[203:358].any()
    with pytest.raises(ValueError, match="above 0"):
        draw([])
