"""Videos: the reference's frames byte for byte, the awkward files, windows, and memory."""

import hashlib
import itertools
import shutil

import av
import numpy as np
import pytest
from PIL import Image

from support.media import EXPECTED, MEDIA, number_in, write_sound, write_video
from vl3_jax.errors import InputError
from vl3_jax.processing import frame_selection, frame_table, video_file
from vl3_jax.processing.video_reader import FrameSamplingOptions, PlanChangedError
from vl3_jax.processing.videos import open_video

EDGE = MEDIA / "edge"
ALL = FrameSamplingOptions(max_frames=10**6)


def arrays(clip):
    return [np.asarray(frame) for frame in clip.frames()]


def numbers(clip):
    """Which numbered frames a written video shows."""
    return [number_in(frame) for frame in arrays(clip)]


@pytest.mark.parametrize("record", EXPECTED, ids=lambda record: record["file"])
def test_one_frame_per_second_is_what_ffmpeg_gives(record):
    path = MEDIA / record["file"]
    expected = record["sampled_1fps"]
    clip = open_video(path, ALL)
    assert (clip.height, clip.width) == (record["height"], record["width"])
    assert len(clip._table.starts) == record["decoded_frames"]
    if not expected["frames"]:  # shorter than a second: one frame rather than none
        assert (clip.indices, clip.timestamps) == ([0], [0.0])
        return
    frames = arrays(clip)
    assert len(frames) == len(clip.indices) == expected["frames"]
    if isinstance(expected["timestamps"], list):
        assert clip.timestamps == expected["timestamps"]
        shown = [float(clip._table.starts[index] * clip._table.unit) for index in clip.indices]
        np.testing.assert_allclose(shown, expected["source_times"], atol=1e-4)
    colours = np.array([frame.mean((0, 1)) for frame in frames])
    evenly = frame_selection.cap_indices(len(frames), len(expected["mean_rgb"]))
    np.testing.assert_allclose(colours[evenly], expected["mean_rgb"], atol=1)
    assert hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest() == expected["sha256"]
    if "capped_180" in record:
        kept = frame_selection.cap_indices(expected["frames"], 180)
        assert (kept[:8], kept[-8:], sum(kept)) == tuple(record["capped_180"].values())
        assert open_video(path).indices == [clip.indices[position] for position in kept]


def test_a_cut_off_file_gives_what_is_there_and_says_so():
    clip = open_video(EDGE / "city_truncated.mp4")
    assert clip.timestamps == [0.0, 1.0, 2.0]
    assert len(arrays(clip)) == 3
    assert "city_truncated.mp4: cut off or damaged; the first 3.88 s of 7.60 s" in clip.notes[0]


def test_frames_that_do_not_decode_change_the_plan(tmp_path):
    """The container promises frames that the decoder cannot give."""
    path = tmp_path / "hole.mov"
    write_video(path, range(0, 5100, 100), codec="png", pixels="rgb24")
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for start, size in packets[15:33]:
        data[start : start + size] = bytes(size)
    path.write_bytes(data)
    clip = open_video(path)
    assert clip.indices == [9, 19, 29, 39, 49]
    with pytest.raises(PlanChangedError):
        arrays(clip)
    assert numbers(clip) == [9, 14, 14, 39, 49]
    assert clip.timestamps == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert "hole.mov: damaged; 33 frames could be decoded" in clip.notes[0]


def test_windows(tmp_path):
    path = tmp_path / "ticks.mp4"
    write_video(path, range(0, 10_100, 100))

    def shown(**options):
        clip = open_video(path, FrameSamplingOptions(**options))
        return list(zip(numbers(clip), clip.timestamps, strict=True))

    assert shown(start=2.0, end=5.0) == [(29, 2.0), (39, 3.0), (49, 4.0)]
    assert shown(start=2.5, end=5.0) == [(34, 2.5), (44, 3.5)]
    assert shown(start=8.0) == [(89, 8.0), (99, 9.0)]
    assert shown(end=2.0) == [(9, 0.0), (19, 1.0)]
    assert shown(start=2.5, end=5.5, precise_time=True) == [(39, 2.5), (39, 3.5), (49, 4.5)]
    # By index: the middle of frames 19 to 28, labelled index / rate; 101 frames in 10.04 s are the rate.
    assert shown(start=2.0, end=2.9) == [(24, pytest.approx(24 * 10.04 / 101))]
    assert shown(fps=2.0, end=2.0) == [(4, 0.0), (9, 0.5), (14, 1.0), (19, 1.5)]
    assert [time for _, time in shown(max_frames=3)] == [0.0, 4.0, 9.0]
    assert [number for number, _ in shown(preprocess="native", max_frames=4)] == [0, 25, 50, 75]
    assert [number for number, _ in shown(preprocess="native", start=5, end=9)] == [51, 61, 71, 81]


def test_a_short_video_shows_its_middle_frame(tmp_path):
    write_video(tmp_path / "short.mp4", range(0, 600, 100))
    clip = open_video(tmp_path / "short.mp4")
    assert (clip.indices, clip.timestamps) == ([3], [0.0])
    assert numbers(clip) == [3]


@pytest.mark.parametrize(("rotation", "quarter_turns"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_rotation_is_honoured(rotation, quarter_turns, monkeypatch):
    monkeypatch.setattr(video_file, "_rotation", lambda frame: rotation)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    upright = video_file._RgbConverter()(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
    np.testing.assert_array_equal(upright, np.rot90(pixels, quarter_turns))


def test_skipping_what_is_not_shown_changes_nothing(tmp_path, monkeypatch):
    """Sparse frames of a long file: whole stretches are left out, the pixels stay."""
    path = tmp_path / "long.mp4"
    write_video(path, range(0, 40_000, 40), gop=25, bf=2)
    sparse = FrameSamplingOptions(max_frames=4)
    table = open_video(path, sparse)._table
    assert len(frame_table.runs(table.packets, [table.starts[i] for i in open_video(path, sparse).indices])) == 4
    quick = arrays(open_video(path, sparse))
    monkeypatch.setattr(frame_table, "_FAR", 10**6)
    monkeypatch.setattr(video_file, "_SKIPPABLE", ())
    for one, other in zip(quick, arrays(open_video(path, sparse)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_variable_frame_rate_holds_the_last_frame(tmp_path):
    write_video(tmp_path / "vfr.mp4", [0, 100, 900, 3500, 3600, 5000])
    clip = open_video(tmp_path / "vfr.mp4")
    assert clip.indices[:5] == [2, 2, 2, 4, 4]
    assert clip.timestamps[:5] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_frames_come_one_by_one():
    clip = open_video(EDGE / "city_vfr.mp4")
    first = next(iter(clip.frames()))
    assert first.size == (clip.width, clip.height)


def test_bytes_and_files_give_the_same():
    path = EDGE / "city_odd_355x201.avi"
    for source in (path.read_bytes(), path.open("rb")):
        for one, other in zip(arrays(open_video(source)), arrays(open_video(path)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_gif_by_index_and_webp_by_its_times():
    gif, webp = open_video(EDGE / "city.gif"), open_video(EDGE / "city.webp")
    assert (gif.indices, gif.timestamps) == ([12, 37], [0.48, 1.48])
    assert webp.indices == [4, 9, 14, 19, 24, 29, 34]
    assert webp.timestamps == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    expected = Image.open(EDGE / "city.webp")
    for index, frame in zip(webp.indices, arrays(webp), strict=True):
        expected.seek(index)
        np.testing.assert_array_equal(frame, np.asarray(expected.convert("RGB")))
    window = open_video(EDGE / "city.webp", FrameSamplingOptions(start=2.0, end=4.0))
    assert (window.indices, window.timestamps) == ([14, 19], [2.0, 3.0])
    assert open_video(EDGE / "city.webp", FrameSamplingOptions(preprocess="native")).indices[:2] == [0, 5]


def test_a_folder_of_frames(tmp_path):
    for number in range(10):
        Image.new("RGB", (20, 30), (number, 0, 0)).save(tmp_path / f"{number:03}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    clip = open_video(tmp_path)
    assert clip.timestamps == [1 / 3, 4 / 3, 7 / 3]
    assert [frame[0, 0, 0] for frame in arrays(clip)] == [1, 4, 7]
    assert (clip.height, clip.width) == (30, 20)


def test_frames_in_memory():
    frames = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), np.uint8)
    for source in (frames, list(frames), [Image.fromarray(frame) for frame in frames]):
        clip = open_video(source, None, [0.5, 1, 1.5, 2, 2.5])
        assert clip.timestamps == [0.5, 1.0, 1.5, 2.0, 2.5]
        np.testing.assert_array_equal(np.stack(arrays(clip)), frames)
    assert open_video(frames).timestamps is None
    assert open_video(frames, FrameSamplingOptions(max_frames=2)).indices == [0, 4]
    with pytest.raises(InputError, match="5 frames but 1 timestamps"):
        open_video(frames, None, [1.0])
    with pytest.raises(InputError, match="the list is empty"):
        open_video([])


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
def test_impossible_choices_are_refused(name, options, message):
    with pytest.raises(InputError, match=message) as caught:
        open_video(EDGE / name, FrameSamplingOptions(**options))
    assert name in str(caught.value)


def unreadable(folder):
    write_sound(folder / "sound.mp4")
    (folder / "zero.mp4").touch()
    (folder / "text.mp4").write_text("Not a video at all.\n" * 100)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    (folder / "bad.gif").write_bytes(b"GIF89a" + bytes(100))
    (folder / "empty").mkdir()
    shutil.copy(EDGE / "city_no_index.mp4", folder)
    return ["sound.mp4", "zero.mp4", "text.mp4", "noise.mp4", "bad.gif", "empty", "city_no_index.mp4", "missing.mp4"]


def test_what_is_no_video_is_refused_in_one_line_with_its_name(tmp_path):
    for name in unreadable(tmp_path):
        with pytest.raises(InputError) as caught:
            arrays(open_video(tmp_path / name))
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_runs_begin_at_a_key_frame_shown_no_later():
    # Decoding order with reordered frames: key 0, 3, 1, 2 | key 6 with leading 4, 5 | 9, 7, 8
    packets = [(0, True), (3, False), (1, False), (2, False), (6, True), (4, False), (5, False), (9, False)]
    assert frame_table.runs(packets, [2]) == [(0, 3)]
    assert frame_table.runs(packets, [5]) == [(0, 6)]  # leads the second key frame, so it may need the first
    assert frame_table.runs(packets, [9]) == [(4, 7)]


def test_decoders_do_not_leak_memory():
    import psutil

    process = psutil.Process()
    for count in itertools.count():
        arrays(open_video(EDGE / "city_odd_355x201.avi"))
        if count == 20:
            before = process.memory_info().rss
        if count == 80:
            break
    assert process.memory_info().rss - before < 30 * 2**20
