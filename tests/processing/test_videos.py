"""Tests of video reading: the reference's frames byte for byte, unusual and damaged files, windows, and memory."""

import hashlib
import itertools
import shutil

import av
import numpy as np
import pytest

from support.media import EXPECTED, MEDIA, read_number, write_audio, write_video
from vl3_jax.errors import InputError
from vl3_jax.processing import frame_selection, frame_table, video_file
from vl3_jax.processing.video_reader import FrameSamplingOptions, PlanChangedError
from vl3_jax.processing.videos import open_video

EDGE = MEDIA / "edge"
ALL_FRAMES = FrameSamplingOptions(max_frames=10**6)


def decode(video):
    return [np.asarray(frame) for frame in video.frames()]


def decode_numbers(video):
    """Returns the numbers of the frames of a video written by `write_video`."""
    return [read_number(frame) for frame in decode(video)]


@pytest.mark.parametrize("record", EXPECTED, ids=lambda record: record["file"])
def test_frames_at_one_per_second_equal_those_of_ffmpeg(record):
    path = MEDIA / record["file"]
    expected = record["sampled_1fps"]
    video = open_video(path, ALL_FRAMES)
    assert (video.height, video.width) == (record["height"], record["width"])
    assert len(video._table.starts) == record["decoded_frames"]
    if not expected["frames"]:  # shorter than a second: one frame rather than none
        assert (video.indices, video.timestamps) == ([0], [0.0])
        return
    frames = decode(video)
    assert len(frames) == len(video.indices) == expected["frames"]
    if isinstance(expected["timestamps"], list):
        assert video.timestamps == expected["timestamps"]
        source_times = [float(video._table.starts[index] * video._table.time_base) for index in video.indices]
        np.testing.assert_allclose(source_times, expected["source_times"], atol=1e-4)
    colours = np.array([frame.mean((0, 1)) for frame in frames])
    evenly_spaced = frame_selection.cap_indices(len(frames), len(expected["mean_rgb"]))
    np.testing.assert_allclose(colours[evenly_spaced], expected["mean_rgb"], atol=1)
    assert hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest() == expected["sha256"]
    if "capped_180" in record:
        kept = frame_selection.cap_indices(expected["frames"], 180)
        assert (kept[:8], kept[-8:], sum(kept)) == tuple(record["capped_180"].values())
        assert open_video(path).indices == [video.indices[position] for position in kept]


def test_a_truncated_file_yields_its_frames_and_a_warning():
    video = open_video(EDGE / "city_truncated.mp4")
    assert video.timestamps == [0.0, 1.0, 2.0]
    assert len(decode(video)) == 3
    assert "city_truncated.mp4: cut off or damaged; the first 3.88 s of 7.60 s" in video.warnings[0]


def test_undecodable_frames_change_the_selection(tmp_path):
    """The container states frames that cannot be decoded."""
    path = tmp_path / "hole.mov"
    write_video(path, range(0, 5100, 100), codec="png", pixels="rgb24")
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for start, size in packets[15:33]:
        data[start : start + size] = bytes(size)
    path.write_bytes(data)
    video = open_video(path)
    assert video.indices == [9, 19, 29, 39, 49]
    with pytest.raises(PlanChangedError):
        decode(video)
    assert decode_numbers(video) == [9, 14, 14, 39, 49]
    assert video.timestamps == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert "hole.mov: damaged; 33 frames could be decoded" in video.warnings[0]


def test_windows(tmp_path):
    path = tmp_path / "ticks.mp4"
    write_video(path, range(0, 10_100, 100))

    def sample(**options):
        video = open_video(path, FrameSamplingOptions(**options))
        return list(zip(decode_numbers(video), video.timestamps, strict=True))

    assert sample(start=2.0, end=5.0) == [(29, 2.0), (39, 3.0), (49, 4.0)]
    assert sample(start=2.5, end=5.0) == [(34, 2.5), (44, 3.5)]
    assert sample(start=8.0) == [(89, 8.0), (99, 9.0)]
    assert sample(end=2.0) == [(9, 0.0), (19, 1.0)]
    assert sample(start=2.5, end=5.5, precise_time=True) == [(39, 2.5), (39, 3.5), (49, 4.5)]
    assert sample(start=2.0, end=2.9) == [(24, 2.4)]  # by index: the middle of frames 19 to 28
    assert sample(fps=2.0, end=2.0) == [(4, 0.0), (9, 0.5), (14, 1.0), (19, 1.5)]
    assert [time for _, time in sample(max_frames=3)] == [0.0, 4.0, 9.0]
    assert [number for number, _ in sample(preprocess="native", max_frames=4)] == [0, 25, 50, 75]
    assert [number for number, _ in sample(preprocess="native", start=5, end=9)] == [50, 60, 70, 80]


def test_a_short_video_yields_its_middle_frame(tmp_path):
    write_video(tmp_path / "short.mp4", range(0, 600, 100))
    video = open_video(tmp_path / "short.mp4")
    assert (video.indices, video.timestamps) == ([3], [0.0])
    assert decode_numbers(video) == [3]


def test_skipping_packets_does_not_change_the_pixels(tmp_path, monkeypatch):
    """For sparse frames of a long file, whole ranges of packets are not decoded."""
    path = tmp_path / "long.mp4"
    write_video(path, range(0, 40_000, 40), gop=25, bf=2)
    sparse = FrameSamplingOptions(max_frames=4)
    table = open_video(path, sparse)._table
    assert (
        len(frame_table.packet_ranges(table.packets, [table.starts[i] for i in open_video(path, sparse).indices])) == 4
    )
    skipping = decode(open_video(path, sparse))
    monkeypatch.setattr(frame_table, "_MAX_JOINED_GAP", 10**6)
    monkeypatch.setattr(video_file, "_SKIPPABLE", ())
    for frame, expected in zip(skipping, decode(open_video(path, sparse)), strict=True):
        np.testing.assert_array_equal(frame, expected)


def test_variable_frame_rate_repeats_the_last_frame(tmp_path):
    write_video(tmp_path / "vfr.mp4", [0, 100, 900, 3500, 3600, 5000])
    video = open_video(tmp_path / "vfr.mp4")
    assert video.indices[:5] == [2, 2, 2, 4, 4]
    assert video.timestamps[:5] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_frames_are_decoded_lazily():
    video = open_video(EDGE / "city_vfr.mp4")
    first = next(iter(video.frames()))
    assert first.size == (video.width, video.height)


def test_bytes_and_file_objects_give_the_frames_of_the_path():
    path = EDGE / "city_odd_355x201.avi"
    for source in (path.read_bytes(), path.open("rb")):
        for frame, expected in zip(decode(open_video(source)), decode(open_video(path)), strict=True):
            np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 5.0, "end": 2.0}, "start 5.0 s is not before end 2.0 s"),
        ({"start": 60.0}, r"start 60.0 s is not before its end at 7.\d+ s"),
        ({"start": 60.0, "preprocess": "native"}, "start 60.0 s is not before its end"),
        ({"start": -1.0}, "start is -1.0"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"max_frames": 0}, "max_frames is 0"),
    ],
)
@pytest.mark.parametrize("name", ["city_vfr.mp4", "city.webp"])
def test_invalid_options_are_refused(name, options, message):
    with pytest.raises(InputError, match=message) as caught:
        open_video(EDGE / name, FrameSamplingOptions(**options))
    assert name in str(caught.value)


def write_unreadable(folder):
    """Writes files and folders that are no videos and returns their names; the last one does not exist."""
    write_audio(folder / "sound.mp4")
    (folder / "zero.mp4").touch()
    (folder / "text.mp4").write_text("Not a video at all.\n" * 100)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    (folder / "bad.gif").write_bytes(b"GIF89a" + bytes(100))
    (folder / "empty").mkdir()
    shutil.copy(EDGE / "city_no_index.mp4", folder)
    return ["sound.mp4", "zero.mp4", "text.mp4", "noise.mp4", "bad.gif", "empty", "city_no_index.mp4", "missing.mp4"]


def test_unreadable_videos_are_refused_with_a_one_line_error(tmp_path):
    for name in write_unreadable(tmp_path):
        with pytest.raises(InputError) as caught:
            decode(open_video(tmp_path / name))
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_packet_ranges_start_at_a_key_frame_presented_no_later():
    # Decoding order with reordered frames: key 0, 3, 1, 2 | key 6, presented after 4, 5 | 9
    packets = frame_table.PacketTable(times=[0, 3, 1, 2, 6, 4, 5, 9], keys=[0, 4])
    assert frame_table.packet_ranges(packets, [2]) == [(0, 3)]
    # 5 precedes the second key frame in presentation order, so it may need the first.
    assert frame_table.packet_ranges(packets, [5]) == [(0, 6)]
    assert frame_table.packet_ranges(packets, [9]) == [(4, 7)]


def test_packets_that_set_the_decoder_up_are_in_a_range():
    packets = frame_table.PacketTable(times=range(100), keys=range(0, 100, 25), setups=[0, 30, 90])
    assert frame_table.packet_ranges(packets, [80]) == [(0, 0), (30, 30), (75, 80)]


def test_decoders_do_not_leak_memory():
    import psutil

    process = psutil.Process()
    for count in itertools.count():
        decode(open_video(EDGE / "city_odd_355x201.avi"))
        if count == 20:
            before = process.memory_info().rss
        if count == 80:
            break
    assert process.memory_info().rss - before < 30 * 2**20
