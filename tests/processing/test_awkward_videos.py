"""Videos as people have them: clocks that jump or begin late, mirrored, damaged, with covers, side data, no times."""

import time

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from support.clips import (
    corners,
    encode,
    mux,
    read_frames,
    read_numbers,
    set_display_matrix,
)
from support.media import AWKWARD
from vl3_jax.errors import InputError
from vl3_jax.processing import video_container, video_file
from vl3_jax.processing.video_reader import FrameSamplingOptions
from vl3_jax.processing.videos import open_video

EVERY_SECOND = [24, 49, 74, 99, 124, 149, 174, 199]


def sample(path, **options):
    """Returns the numbers and the labels of the selected frames, rounded as they are printed."""
    video = open_video(path, FrameSamplingOptions(**options))
    numbers = read_numbers(video)
    return numbers, [round(label, 2) for label in video.timestamps]


def from_second(first, count):
    return [round(first + second, 2) for second in range(count)]


@pytest.mark.parametrize(
    ("name", "options", "numbers", "labels"),
    [
        ("base.mp4", {}, EVERY_SECOND[:4], from_second(0, 4)),
        ("joined.ts", {}, EVERY_SECOND[:6], from_second(1.48, 6)),
        ("joined.ts", {"start": 2.0, "end": 5.0}, [74, 99, 124], from_second(2, 3)),
        ("jump.ts", {}, EVERY_SECOND[:6], from_second(1.48, 6)),
        ("jump.ts", {"start": 2.2, "end": 2.9}, [63], [2.52]),
        ("late.ts", {}, EVERY_SECOND[:4], from_second(3601.4, 4)),
        ("late.ts", {"start": 0.0}, EVERY_SECOND[:4], from_second(0, 4)),
        ("late.ts", {"end": 2.0}, EVERY_SECOND[:2], from_second(0, 2)),
        ("late.ts", {"start": 1.5, "end": 3.5}, [62, 87], from_second(1.5, 2)),
        ("late.ts", {"start": 1.0, "end": 1.5}, [30], [1.2]),
        ("late.ts", {"start": 1.0, "end": 3.0, "preprocess": "native"}, [25, 37, 50, 62], [1.0, 1.48, 2.0, 2.48]),
        ("offset.mp4", {}, EVERY_SECOND[:4], from_second(2, 4)),
        ("offset.mp4", {"start": 0.0, "end": 2.0}, EVERY_SECOND[:2], from_second(0, 2)),
        ("offset.mp4", {"start": 2.5}, [87], [2.5]),
        ("offset.mp4", {"end": 0.4}, [5], [0.0]),
        ("pal8.avi", {}, EVERY_SECOND[:2], from_second(0, 2)),
        ("restart.flv", {}, EVERY_SECOND, from_second(0, 8)),
        ("restart.flv", {"max_frames": 2}, [24, 199], [0.0, 7.0]),
        ("turned.flv", {}, EVERY_SECOND, from_second(0, 8)),
        ("turned.flv", {"start": 5.0, "end": 7.0}, [149, 174], [5.0, 6.0]),
        ("two.mp4", {}, [524, 549, 574, 599], from_second(0, 4)),
        ("corrupt.mp4", {}, [24, 43, 74, 99], from_second(0, 4)),
    ],
)
def test_frames_and_labels(name, options, numbers, labels):
    for source in (AWKWARD / name, (AWKWARD / name).read_bytes()):
        assert sample(source, **options) == (numbers, labels)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("song.mp3", r"has no video \(sound only\)"),
        ("jump.mkv", "lasts 365 days by its own clock"),
        ("mp4_timescale1.mp4", "lasts 23,148 days"),
        ("mp4_1e9_samples.mp4", "no frame could be decoded"),
        ("v_x264_8192x8192.mp4", "frames of 8192 x 8192 pixels are too large to decode"),
    ],
)
def test_refused_at_once(name, message):
    begin = time.monotonic()
    for source in (AWKWARD / name, (AWKWARD / name).read_bytes()):
        with pytest.raises(InputError, match=message) as caught:
            read_frames(open_video(source))
        assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 5


def test_a_window_before_a_jump_of_years_is_read():
    assert sample(AWKWARD / "jump.mkv", end=0.1)[1] == [0.0]


@pytest.mark.parametrize(
    "options", [{}, {"start": 1.0}, {"preprocess": "native"}, {"fps": 1000.0}, {"start": 0.5, "precise_time": True}]
)
def test_a_jump_of_days_takes_no_time(tmp_path, options):
    packets = encode(range(50), bf=0)
    for packet in packets[40:]:
        packet.pts += 25 * 86400 * 5
        packet.dts += 25 * 86400 * 5
    mux(tmp_path / "days.mkv", packets)
    begin = time.monotonic()
    numbers, labels = sample(tmp_path / "days.mkv", max_frames=20, **options)
    assert len(numbers) == (4 if "preprocess" in options else 20)
    assert labels[-1] > 400_000 or "preprocess" in options  # there, labels are index / rate
    assert time.monotonic() - begin < 5


MIRRORS = [
    (1, 0, 0, 1),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (-1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, 1, 0),
    (0, 1, -1, 0),
    (0, -1, -1, 0),
]


@pytest.mark.parametrize("matrix", MIRRORS)
def test_the_whole_display_matrix_is_applied(tmp_path, matrix):
    path = tmp_path / "turned.mp4"
    path.write_bytes((AWKWARD / "base.mp4").read_bytes())
    stored = read_frames(open_video(path))
    set_display_matrix(path, *matrix)
    a, b, c, d = matrix
    video = open_video(path)
    for frame, upright in zip(read_frames(video), stored, strict=True):
        expected = upright if a else upright.transpose(1, 0, 2)
        expected = expected[:, ::-1] if a + c < 0 else expected
        expected = expected[::-1] if b + d < 0 else expected
        np.testing.assert_array_equal(frame, expected)
        assert frame.shape == (video.height, video.width, 3)


def test_mirrored_clips():
    assert corners(read_frames(open_video(AWKWARD / "base.mp4"))[0]) == ["red", "green", "blue", ""]
    assert corners(read_frames(open_video(AWKWARD / "hflip.mp4"))[0]) == ["green", "red", "", "blue"]
    assert corners(read_frames(open_video(AWKWARD / "vflip.mp4"))[0]) == ["blue", "", "red", "green"]


def test_any_angle_is_turned_as_ffmpeg_does(tmp_path):
    path = tmp_path / "askew.mp4"
    path.write_bytes((AWKWARD / "base.mp4").read_bytes())
    half = 0.5**0.5
    set_display_matrix(path, half, half, -half, half)
    frame = read_frames(open_video(path))[0]
    assert frame.shape == (160, 240, 3)
    assert frame[0, 0].max() < 20  # a corner that the turned picture leaves empty


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_parameter_sets_that_come_once_reach_the_decoder(tmp_path, codec):
    """The second half has another size, and says so only in its first frame."""
    quiet = {"x265-params": "log-level=none:repeat-headers=1"} if codec == "libx265" else {"bf": 0}
    name, sets = ("hevc", "32-34") if codec == "libx265" else ("h264", "7-8")
    packets = []
    for numbers, size in ((range(200), (80, 120)), (range(200, 400), (120, 80))):
        first, *others = encode(numbers, codec, size, bframes=0, **quiet)
        without_sets = BitStreamFilterContext(f"filter_units=remove_types={sets}", name)
        packets += [first, *(part for packet in others for part in without_sets.filter(packet))]
    mux(tmp_path / "once.ts", packets, codec)
    assert sample(tmp_path / "once.ts", max_frames=3)[0] == [24, 199, 399]
    assert sample(tmp_path / "once.ts", start=12.0, end=13.0)[0] == [324]


def test_a_palette_that_comes_once_reaches_the_decoder():
    assert sample(AWKWARD / "pal8.avi", start=1.0)[0] == [49]


@pytest.mark.parametrize("extension", ["mkv", "webm"])
def test_a_clock_that_starts_again_goes_on(tmp_path, extension):
    codec = "libvpx" if extension == "webm" else "libx264"
    mux(tmp_path / f"one.{extension}", encode(range(50), codec), codec)
    content = (tmp_path / f"one.{extension}").read_bytes()
    assert sample(content + content) == ([24, 49, 24, 49], [0.0, 1.0, 2.0, 3.0])


def test_a_recorder_that_was_restarted_twice(tmp_path):
    mux(tmp_path / "one.flv", encode(range(50), bf=0))
    content = (tmp_path / "one.flv").read_bytes()
    header = 13  # bytes; tags follow
    assert sample(content + 2 * content[header:]) == ([24, 49] * 3, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize("offset", [95440, 95443, 95445.5])
def test_a_clock_that_wraps_goes_on(tmp_path, offset):
    """The clock of a transport stream has 33 bits: 95,443.7 s."""
    mux(tmp_path / "wrapped.ts", encode(range(100)), output_ts_offset=offset)
    numbers, labels = sample(tmp_path / "wrapped.ts")
    assert numbers == EVERY_SECOND[:4]
    assert np.diff(labels) == pytest.approx(1)
    assert sample(tmp_path / "wrapped.ts", start=1.0, end=3.0) == ([49, 74], [1.0, 2.0])


@pytest.mark.parametrize(
    ("extension", "codec", "numbers"),
    [
        ("h264", "libx264", EVERY_SECOND[:4]),
        ("m1v", "mpeg1video", EVERY_SECOND[:4]),
        ("avi", "libx264", [22, 47, 72, 97]),  # AVI states times of decoding alone, which are two frames later
        ("mpg", "mpeg2video", EVERY_SECOND[:4]),
        ("flv", "libx264", EVERY_SECOND[:4]),
        ("mov", "libx264", EVERY_SECOND[:4]),
        ("wmv", "wmv2", EVERY_SECOND[:4]),
        ("ivf", "libvpx", EVERY_SECOND[:4]),
        ("nut", "mpeg4", EVERY_SECOND[:4]),
    ],
)
def test_containers_and_missing_times(tmp_path, extension, codec, numbers):
    path = tmp_path / f"clip.{extension}"
    mux(path, encode(range(100), codec, bf=2) if codec != "wmv2" else encode(range(100), codec), codec)
    assert sample(path)[0] == numbers
    assert sample(path.read_bytes())[0] == numbers


def write_tracks(path, tracks, sound=False):
    """Writes a container of several tracks: (packets, codec, size, names of the disposition)."""
    with av.open(str(path), "w") as container:
        streams = []
        for _, codec, (height, width), disposition in tracks:
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width = height, width
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = sum(getattr(av.stream.Disposition, name) for name in disposition)
            streams.append(stream)
        for stream, (packets, *_) in zip(streams, tracks, strict=True):
            for packet in packets:
                packet.stream = stream
                container.mux(packet)


def test_covers_are_no_video(tmp_path):
    cover = encode([4095], "mjpeg", color_range="pc"), "mjpeg", (80, 120), ["attached_pic"]
    write_tracks(tmp_path / "covers.mp4", [(encode(range(50)), "libx264", (80, 120), ["default"]), cover])
    assert sample(tmp_path / "covers.mp4")[0] == [24, 49]


@pytest.mark.parametrize(("defaults", "numbers"), [((0, 0), [74]), ((1, 0), [24]), ((0, 1), [74]), ((1, 1), [74])])
def test_the_default_track_and_then_the_larger_one_is_taken(tmp_path, defaults, numbers):
    sizes, ranges = [(80, 120), (160, 240)], [range(25), range(50, 75)]
    tracks = []
    for size, frames, is_default in zip(sizes, ranges, defaults, strict=True):
        packets = encode(frames, size=size, bf=0)
        for packet in packets:
            packet.pts -= frames[0]
            packet.dts -= frames[0]
        tracks.append((packets, "libx264", size, ["default"] if is_default else []))
    write_tracks(tmp_path / "tracks.mkv", tracks)
    assert sample(tmp_path / "tracks.mkv")[0] == numbers


def test_a_still_shot_stays_on_display(tmp_path):
    """A frame is shown in each tick in which it is on display, in a window too, and never before its time."""
    packets = encode(range(40), bf=0)
    for packet in packets[30:]:
        packet.pts += 75
        packet.dts += 75
    mux(tmp_path / "still.mkv", packets)  # frames 0 to 29 in 1.2 s, then 30 to 39 from 4.2 s on
    assert sample(tmp_path / "still.mkv") == ([24, 29, 29, 29], [0.0, 1.0, 2.0, 3.0])
    assert sample(tmp_path / "still.mkv", end=2.0) == ([24, 29], [0.0, 1.0])
    assert sample(tmp_path / "still.mkv", start=2.0, end=4.5) == ([29, 29], [2.0, 3.0])
    assert sample(tmp_path / "still.mkv", start=2.0, end=2.5) == ([29], [2.0])


def test_pictures_that_begin_after_the_sound(tmp_path):
    packets = encode(range(50), bf=0)
    for packet in packets:
        packet.pts += 40  # 1.6 s
        packet.dts += 40
    with av.open(str(tmp_path / "late.mp4"), "w") as container:
        pictures, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=8000)
        pictures.height, pictures.width, pictures.pix_fmt = 80, 120, "yuv420p"
        for start in range(0, 4 * 8000, 1024):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts = 8000, start
            container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
        for packet in packets:
            packet.stream = pictures
            container.mux(packet)
    assert sample(tmp_path / "late.mp4") == ([9, 34], [1.6, 2.6])
    assert sample(tmp_path / "late.mp4", start=0.0, end=3.0) == ([9, 34], [1.0, 2.0])
    assert sample(tmp_path / "late.mp4", start=2.0) == ([34], [2.0])
    with pytest.raises(InputError, match=r"pictures begin at 1.60 s, after end 1.5 s"):
        open_video(tmp_path / "late.mp4", FrameSamplingOptions(end=1.5))


OTHER_FILES = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:4.0,\n{path}\n#EXT-X-ENDLIST\n",
    "list.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:4.0,\nfile://{path}\n#EXT-X-ENDLIST\n",
    "concat.mp4": "ffconcat version 1.0\nfile {path}\n",
    "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 50314 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "stream.mpd": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
    '<AdaptationSet contentType="video"><Representation id="1" bandwidth="1000"><BaseURL>{path}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
    "subtitles.mp4": "1\n00:00:00,000 --> 00:00:04,000\nHello.\n",
    "styled.ass": "[Script Info]\nScriptType: v4.00+\n\n[Events]\nDialogue: 0,0:00:00.00,0:00:05.00,,,0,0,0,,Hi\n",
    "script.vpy": "import vapoursynth\nvapoursynth.core.ffms2.Source('{path}').set_output()\n",
    "talk.json": '{{"captions":[{{"duration":1000,"content":"x","startOfParagraph":true,"startTime":0}}]}}',
    "graph.lavfi": "movie={path}",
    "address.mp4": "rtsp://127.0.0.1:1/x",
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_what_names_other_files_or_runs_is_not_opened(tmp_path, name):
    content = OTHER_FILES[name].format(path=AWKWARD / "base.mp4").encode()
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, content):
        with pytest.raises(InputError, match=r"not a .*video"):
            open_video(source)


def test_only_demuxers_that_exist_are_in_the_white_list():
    known = {name for names in av.formats_available for name in names.split(",")}
    assert set(video_container.CONTAINERS) <= known


@pytest.mark.parametrize(
    "name", ["10:22:33.mp4", "file:clip.mp4", "clip%03d.mp4", "clip.jpg", "clip", "concat:a|b.mp4"]
)
def test_the_content_alone_says_what_a_file_is(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes((AWKWARD / "base.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert sample(name)[0] == EVERY_SECOND[:4]


def test_a_file_that_may_not_be_read(monkeypatch):
    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(video_container.os, "open", refuse)
    with pytest.raises(InputError, match=r"base.mp4: no permission to read it"):
        open_video(AWKWARD / "base.mp4")


@pytest.mark.parametrize(
    "error", [ValueError("two\nlines"), OverflowError("x"), EOFError(), av.error.MemoryError(12, "no memory")]
)
def test_whatever_a_media_library_raises_is_one_line(monkeypatch, error):
    def fail(*_):
        raise error

    video = open_video(AWKWARD / "base.mp4")
    monkeypatch.setattr(video_file, "upright_size", fail)
    monkeypatch.setattr(video_file.UprightRgb, "__call__", fail)
    for read in (lambda: open_video(AWKWARD / "base.mp4"), lambda: read_frames(video)):
        with pytest.raises(InputError, match=r"base.mp4: damaged video \(.+\); replace the file") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_reading_ends_where_the_library_loses_count():
    """PyAV does at the end of a file in which a track appears on the way."""

    class Container:
        def demux(self, stream):
            yield from encode([0], "mpeg4")
            raise IndexError("list index out of range")

    assert len(list(video_container.stored_packets(Container(), None))) == 1
