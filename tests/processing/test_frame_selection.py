"""Tests of frame selection: golden selections, and properties of the rules against FFmpeg and torch."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3_jax.processing import frame_selection

MS = Fraction(1, 1000)


def select_by_ticks(frames, rate, fps=1, max_frames=180):
    time_base = 1 / Fraction(rate)
    return frame_selection.by_ticks(range(frames), frames, time_base, Fraction(fps), 0.0).capped(max_frames)


@pytest.mark.parametrize(
    ("frames", "rate", "indices", "labels"),
    [
        (300, 30, [29, 59, 89], [0.0, 1.0, 2.0]),
        (315, 30, [29, 59, 89, 119], [0.0, 1.0, 2.0, 3.0]),
        (75, 25, [24, 49, 74], [0.0, 1.0, 2.0]),
        (60, 30, [29, 59], [0.0, 1.0]),
        (9000, 30, [29, 59, 119, 179], [0.0, 1.0, 3.0, 5.0]),
    ],
)
def test_official_selection(frames, rate, indices, labels):
    selection = select_by_ticks(frames, rate)
    assert selection.indices[: len(indices)] == indices
    assert selection.timestamps[: len(labels)] == labels
    assert len(selection.indices) == min(frames // rate, 180)


@pytest.mark.parametrize(
    ("frames", "rate", "indices", "labels", "count"),
    [
        (300, 30, [0, 30, 60], ["0.0", "1.0", "2.0"], 10),
        (315, 30, [0, 31, 63, 94], ["0.0", "1.0", "2.1", "3.1"], 10),
        (75, 25, [0, 18, 37, 56], ["0.0", "0.7", "1.5", "2.2"], 4),
        (60, 30, [0, 15, 30, 45], ["0.0", "0.5", "1.0", "1.5"], 4),
        (9000, 30, [0, 50, 100], ["0.0", "1.7", "3.3"], 180),
    ],
)
def test_native_selection(frames, rate, indices, labels, count):
    selection = frame_selection.native(frames, rate, fps=1, max_frames=180)
    assert len(selection.indices) == count
    assert selection.indices[: len(indices)] == indices
    assert [f"{time:.1f}" for time in selection.timestamps[: len(labels)]] == labels


@settings(deadline=None)  # the first import takes seconds
@given(total=st.integers(1, 4000), rate=st.sampled_from([5, 23.976, 25, 29.97]), fps=st.sampled_from([0.5, 1, 2]))
def test_native_indices_equal_those_of_torch(total, rate, fps):
    torch = pytest.importorskip("torch")
    count = math.floor(min(max(total / rate * fps, 4), 180, total))
    expected = torch.arange(0, total, total / count).int().tolist()
    assert frame_selection.native(total, rate, fps, 180).indices == [index for index in expected if index < total]


@st.composite
def timelines(draw):
    """Generates frame times in milliseconds (from 0 on, strictly ascending) and the length of the last frame."""
    gaps = draw(st.lists(st.integers(1, 2500), max_size=60))
    return np.cumsum([0, *gaps]).tolist(), draw(st.integers(0, 1500))


@given(timeline=timelines(), fps=st.sampled_from(["1", "2", "0.5", "3.7", "29.97"]))
def test_each_tick_selects_the_last_frame_started_by_its_end(timeline, fps):
    times, last_duration = timeline
    fps, end = Fraction(fps), times[-1] + last_duration
    selection = frame_selection.by_ticks(times, end, MS, fps, 0.0)
    assert len(selection.indices) == math.floor(end * MS * fps)
    for tick, index in enumerate(selection.indices):
        assert index == max(i for i, time in enumerate(times) if math.floor(time * MS * fps) <= tick)
    np.testing.assert_allclose(selection.timestamps, np.arange(len(selection.indices)) / float(fps), atol=1e-9)


@pytest.mark.parametrize("rate", ["24", "25", "30", "30000/1001", "24000/1001", "60000/1001"])
@pytest.mark.parametrize("fps", [1, 2])
def test_ticks_equal_the_fps_filter_of_ffmpeg(rate, fps):
    """Frame numbers pass through FFmpeg's filter as grey levels."""
    import av

    rate = Fraction(rate)
    frames = math.floor(3.3 * rate)
    graph = av.filter.Graph()
    source = graph.add_buffer(width=16, height=16, format=av.VideoFormat("gray"), time_base=1 / rate)
    graph.link_nodes(source, graph.add("fps", f"fps={fps}:round=down"), graph.add("buffersink")).configure()
    for number in range(frames):
        frame = av.VideoFrame.from_ndarray(np.full((16, 16), number, np.uint8), format="gray")
        frame.pts, frame.time_base, frame.duration = number, 1 / rate, 1
        graph.push(frame)
    graph.push(None)
    selected = []
    while True:
        try:
            selected.append(int(graph.pull().to_ndarray()[0, 0]))
        except (av.BlockingIOError, av.EOFError):
            break
    assert select_by_ticks(frames, rate, fps).indices == selected


def test_ticks_before_the_first_frame_are_left_out():
    expected = frame_selection.FrameSelection([1, 2, 2], [1.0, 2.0, 3.0])
    assert frame_selection.by_ticks([1600, 1700, 2500], 4000, MS, Fraction(1), 0.0) == expected


@given(start=st.floats(0, 1e5), fps=st.sampled_from([0.5, 1, 3.7, 29.97]), count=st.integers(1, 500))
def test_labels_are_rounded_as_those_of_the_reference(start, fps, count):
    expected = np.arange(start, start + (count + 1) / fps, 1 / fps)[:count].tolist()
    assert frame_selection.tick_labels(range(count), Fraction(str(fps)), start) == expected


def test_a_year_of_ticks_is_counted_and_not_listed():
    selection = frame_selection.by_ticks([0, 1], 3 * 10**10, MS, Fraction(1000), 0.0, max_frames=3)
    assert selection.indices == [0, 1, 1]
    assert selection.timestamps == pytest.approx([0, 15e6, 30e6], rel=1e-6)


@given(count=st.integers(0, 3000), cap=st.integers(1, 400))
def test_capping_keeps_the_ends_and_the_order(count, cap):
    kept = frame_selection.cap_indices(count, cap)
    assert len(kept) == min(count, cap)
    assert kept == sorted(set(kept))
    if count and cap > 1:
        assert (kept[0], kept[-1]) == (0, count - 1)


def test_index_based_selection():
    assert frame_selection.by_index(10, 3.0, 1, 180).indices == [1, 4, 7]  # a folder of ten images
    assert frame_selection.by_index(38, 25.0, 1, 180) == frame_selection.FrameSelection([12, 37], [0.48, 1.48])  # a GIF
    assert frame_selection.by_index(2, 3.0, 1, 180).indices == [1]
    assert frame_selection.by_index(1000, 3.0, 1, 4).indices == [0, 333, 666, 999]  # longer than the cap in seconds
    assert frame_selection.by_index(190, 25.0, 1, 180, 2.0, 2.9).indices == [60]  # frames 49 to 71, one step
    assert frame_selection.by_index(190, 25.0, 1, 180, 0.0, 0.02).indices == []
