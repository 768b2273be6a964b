"""Tests of videos that are not video files: folders of frames, animations, and frames in memory."""

import contextlib
import io
import struct
import time

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from support.media import AWKWARD, MEDIA
from vl3_jax.errors import InputError
from vl3_jax.processing import frame_sets, images
from vl3_jax.processing.messages import MediaPart
from vl3_jax.processing.processor import open_media
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.video_reader import FrameSamplingOptions
from vl3_jax.processing.videos import open_video

EDGE = MEDIA / "edge"
ALL_OF_FOLDER = FrameSamplingOptions(fps=3)
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), np.uint8)


def decode(video):
    return [np.asarray(frame) for frame in video.frames()]


def read_bars(frame):
    """Returns the number that a frame shows as twelve vertical bars, the highest bit at the left."""
    height, width, _ = frame.shape
    bits = [frame[height // 2, int((bar + 0.5) * width / 12)].mean() > 127 for bar in range(12)]
    return int("".join("01"[int(bit)] for bit in bits), 2)


def write_frames(folder, names):
    """Writes one frame a name, which is as red as its place in the list."""
    for number, name in enumerate(names):
        Image.new("RGB", (20, 30), (number, 0, 0)).save(folder / name)


def animation(frames, kind, **options):
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


def grey_frames(count, size=(24, 16)):
    return [Image.new("RGB", size, (10 * number,) * 3) for number in range(count)]


def test_a_folder_of_frames(tmp_path):
    write_frames(tmp_path, [f"{number:03}.png" for number in range(10)])
    (tmp_path / "notes.txt").write_text("not a frame")
    video = open_video(tmp_path)
    assert video.timestamps == [1 / 3, 4 / 3, 7 / 3]
    assert [frame[0, 0, 0] for frame in decode(video)] == [1, 4, 7]
    assert (video.height, video.width) == (30, 20)


def test_unpadded_numbers_are_in_natural_order():
    numbers = [read_bars(frame) for frame in decode(open_video(AWKWARD / "frames_unpadded", ALL_OF_FOLDER))]
    assert numbers == list(range(12))


@pytest.mark.parametrize(
    "names",
    [
        ["1.png", "2.png", "10.png"],
        ["10:22:33.png", "10:22:34.png", "10:23:01.png"],
        ["a9b10.png", "a10b2.png", "a10b11.png", "b1.png"],
        ["f01.png", "f1.png", "f2.png"],
        ["shot.png", "shot1.png", "shot2.png"],
        ["٣.png", "٤.png", "١٠.png"],
        [f"{10**200 + number}.png" for number in range(3)],
    ],
)
def test_names_are_sorted_by_the_values_of_their_numbers(names, tmp_path):
    write_frames(tmp_path, names)
    assert [frame[0, 0, 0] for frame in decode(open_video(tmp_path, ALL_OF_FOLDER))] == list(range(len(names)))


def test_what_systems_leave_in_folders_is_no_frame(tmp_path):
    write_frames(tmp_path, ["0.png", "1.PNG"])
    for name in ("Thumbs.db", ".DS_Store", "._0.png", "list.m3u8", "page.eps", "drawing.wmf", "clip.mpg"):
        (tmp_path / name).write_bytes(b"something else")
    (tmp_path / "more.png").mkdir()
    assert [frame[0, 0, 0] for frame in decode(open_video(tmp_path, ALL_OF_FOLDER))] == [0, 1]


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_a_broken_frame_is_named(content, tmp_path):
    write_frames(tmp_path, ["0.png", "1.png"])
    if content is None:
        (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    else:
        (tmp_path / "2.png").write_bytes(content)
    with pytest.raises(InputError, match=r"2\.png: ") as caught:
        decode(open_video(tmp_path, ALL_OF_FOLDER))
    assert "\n" not in str(caught.value)


def test_frames_of_mixed_kinds_are_read_and_noted_once(tmp_path):
    for number in range(4):
        Image.new("RGBA", (8 + number, 8), (0, 0, 0, 0 if number else 255)).save(tmp_path / f"{number}.png")
    video = open_video(tmp_path, ALL_OF_FOLDER)
    assert [(frame.shape, frame.mean()) for frame in decode(video)] == [
        ((8, 8, 3), 0),
        *(((8, 8 + number, 3), 255) for number in range(1, 4)),
    ]
    assert video.warnings == [f"{tmp_path / '1.png'}: transparent; shown on white"]
    native = open_video(tmp_path, FrameSamplingOptions(preprocess="native"))
    assert decode(native)[-1].mean() == 255
    assert not native.warnings


def test_gif_is_sampled_by_index_and_webp_by_time():
    gif, webp = open_video(EDGE / "city.gif"), open_video(EDGE / "city.webp")
    assert (gif.indices, gif.timestamps) == ([12, 37], [0.48, 1.48])
    assert webp.indices == [4, 9, 14, 19, 24, 29, 34]
    assert webp.timestamps == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    expected = Image.open(EDGE / "city.webp")
    for index, frame in zip(webp.indices, decode(webp), strict=True):
        expected.seek(index)
        np.testing.assert_array_equal(frame, np.asarray(expected.convert("RGB")))
    window = open_video(EDGE / "city.webp", FrameSamplingOptions(start=2.0, end=4.0))
    assert (window.indices, window.timestamps) == ([14, 19], [2.0, 3.0])
    assert open_video(EDGE / "city.webp", FrameSamplingOptions(preprocess="native")).indices[:2] == [0, 5]


def test_a_window_begins_with_the_frame_on_display():
    video = open_video(animation(grey_frames(4), "WEBP", duration=2000), FrameSamplingOptions(start=1, end=5))
    assert video.indices == [0, 1, 1, 2]
    assert video.timestamps == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("preprocess", ["official", "native"])
def test_a_transparent_animation_is_shown_on_white(kind, preprocess):
    """Each frame shows a black column; what is transparent is black too."""
    pixels = np.zeros((4, 9, 9, 4), np.uint8)
    for number in range(4):
        pixels[number, :, number, 3] = 255
    options = {"lossless": True} if kind == "WEBP" else {"disposal": 2}
    data = animation([Image.fromarray(frame) for frame in pixels], kind, duration=1000, **options)
    video = open_video(data, FrameSamplingOptions(fps=25, preprocess=preprocess))
    frames = dict(zip(video.indices, decode(video), strict=True))
    assert list(frames) == [0, 1, 2, 3]
    for number, frame in frames.items():
        np.testing.assert_array_equal(frame, np.repeat(255 - pixels[number, ..., 3:], 3, -1))
    assert video.warnings == ["video bytes: transparent; shown on white"] * (preprocess == "official")


def test_an_image_before_an_animated_png_is_none_of_its_frames():
    first, *others = grey_frames(4)
    data = animation([first, *others], "PNG", duration=1000, default_image=True)
    video = open_video(data)
    assert [frame[0, 0, 0] for frame in decode(video)] == [10, 20, 30]
    assert (video.indices, video.timestamps, video.warnings) == ([0, 1, 2], [0.0, 1.0, 2.0], [])


def test_durations_of_fractions_of_a_millisecond_do_not_drift():
    video = open_video(animation(grey_frames(24), "PNG", duration=1000 / 30), FrameSamplingOptions(fps=10))
    assert video.indices == [2, 5, 8, 11, 14, 17, 20, 23]


@pytest.mark.parametrize("kind", ["PNG", "PNG with XMP", "WEBP"])
def test_the_orientation_of_an_animation_is_applied(kind):
    tags, texts = Image.Exif(), PngImagePlugin.PngInfo()
    tags[0x0112] = 6
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    options = {"PNG": {"exif": tags}, "PNG with XMP": {"pnginfo": texts}, "WEBP": {"exif": tags, "lossless": True}}
    frames = [Image.fromarray(frame) for frame in FRAMES]
    video = open_video(animation(frames, kind.split()[0], duration=1000, **options[kind]))
    assert (video.height, video.width) == (30, 20)
    for frame, expected in zip(decode(video), FRAMES, strict=True):
        np.testing.assert_array_equal(frame, np.rot90(expected, -1))


def test_a_truncated_animation_yields_its_frames_and_a_warning():
    video = open_video(AWKWARD / "truncated.gif")
    (frame,) = decode(video)
    np.testing.assert_allclose(frame.mean((0, 1)), [158.2, 85.6, 51.8], atol=1)
    assert video.warnings == [f"{AWKWARD / 'truncated.gif'}: damaged after frame 1; the frames up to it are used"]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_an_animation_that_breaks_off_anywhere_is_read_or_refused(kind):
    data = animation([Image.fromarray(frame) for frame in FRAMES], kind, duration=500)
    for length in range(16, len(data), len(data) // 60):
        with contextlib.suppress(InputError):
            video = open_video(data[:length])
            assert len(decode(video)) == video.num_frames


def test_an_animation_of_endless_pixels_is_refused_at_once(monkeypatch):
    start = time.monotonic()
    with pytest.raises(InputError, match="frames of 13000 x 13000 pixels are too large to decode"):
        open_video(AWKWARD / "gif_13000x13000x1000.gif")
    assert time.monotonic() - start < 1
    monkeypatch.setattr(images, "MAX_PIXELS", 5 * 24 * 16)
    assert open_video(animation(grey_frames(5), "GIF")).indices
    for kind in ("GIF", "WEBP", "PNG"):
        with pytest.raises(InputError, match="6 frames of 24 x 16 pixels are too many to decode"):
            open_video(animation(grey_frames(6), kind))


def test_a_frame_that_enlarges_the_animation_is_bounded_too(monkeypatch):
    monkeypatch.setattr(frame_sets, "MAX_FRAME_PIXELS", 24 * 16)
    data = bytearray(animation(grey_frames(3), "GIF"))
    second = data.index(b",", data.index(b",") + 1)
    data[second + 5 : second + 7] = struct.pack("<H", 9000)  # its width
    video = open_video(bytes(data))
    assert len(decode(video)) == 1
    assert "damaged after frame 1 of 3" in video.warnings[0]


@pytest.mark.parametrize("fps", [1, 1000])
def test_an_animation_of_weeks_is_selected_at_once(fps):
    start = time.monotonic()
    data = animation(grey_frames(5), "WEBP", duration=16_000_000_000 // 1000)
    video = open_video(data, FrameSamplingOptions(fps=fps, max_frames=3))
    assert video.indices == [0, 2, 4]
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("preprocess", ["official", "native"])
def test_a_window_may_end_long_after_the_animation(preprocess):
    video = open_video(EDGE / "city.webp", FrameSamplingOptions(start=6, end=1e9, max_frames=1, preprocess=preprocess))
    assert video.num_frames == 1
    for options in ({"end": 1e308}, {"end": 2**70}, {"fps": 1e300}, {"start": float("inf")}):
        with pytest.raises(InputError, match=f"{next(iter(options))} is "):
            open_video(EDGE / "city.webp", FrameSamplingOptions(**options, preprocess=preprocess))


def test_frames_in_memory():
    sources = (FRAMES, list(FRAMES), tuple(FRAMES), [Image.fromarray(frame) for frame in FRAMES], FRAMES / 255)
    for source in sources:
        video = open_video(source, None, [0.5, 1, 1.5, 2, 2.5])
        assert video.timestamps == [0.5, 1.0, 1.5, 2.0, 2.5]
        np.testing.assert_array_equal(np.stack(decode(video)), FRAMES)
    assert open_video(FRAMES).timestamps is None


@pytest.mark.parametrize("library", ["jax.numpy", "torch"])
def test_anything_with_array_is_a_video(library):
    asarray = pytest.importorskip(library).asarray
    channels_first = np.moveaxis(FRAMES, -1, 1).copy()
    times = asarray(np.arange(5.0))
    for source in (asarray(FRAMES), asarray(channels_first), [asarray(frame) for frame in FRAMES]):
        video = open_video(source, None, times)
        np.testing.assert_array_equal(np.stack(decode(video)), FRAMES)
        assert video.timestamps == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "timestamps", "expected"),
    [
        ({"max_frames": 2}, None, [0, 4]),
        ({"max_frames": 2**70}, None, [0, 1, 2, 3, 4]),
        ({"start": 1.0}, [0, 1, 2, 3, 4], [1, 2, 3, 4]),
        ({"end": 3.0}, [0, 1, 2, 3, 4], [0, 1, 2]),
        ({"start": 1.0, "end": 4.0, "max_frames": 2}, [0, 1, 2, 3, 4], [1, 3]),
    ],
)
def test_options_of_frames_in_memory_are_applied(options, timestamps, expected):
    for video in (
        open_video(FRAMES, FrameSamplingOptions(**options), timestamps),
        open_media(MediaPart("video", FRAMES, options | {"timestamps": timestamps}), ProcessorConfig()),
    ):
        assert video.indices == expected
        assert video.timestamps == (timestamps and [timestamps[index] for index in expected])
        np.testing.assert_array_equal(np.stack(decode(video)), FRAMES[expected])


def test_the_settings_cap_frames_in_memory():
    video = open_media(MediaPart("video", tuple(FRAMES)), ProcessorConfig(max_frames=3, fps=2))
    assert video.indices == [0, 2, 4]


@pytest.mark.parametrize(
    ("options", "timestamps", "message"),
    [
        ({"fps": 2.0}, None, "fps does not apply to frames already chosen"),
        ({"fps": 1.0}, [0, 1, 2, 3, 4], "fps does not apply to frames already chosen"),
        ({"start": 1.0}, None, "start does not apply"),
        ({"end": 1.0}, None, "end does not apply"),
        ({"precise_time": True}, None, "precise_time does not apply"),
        ({"start": 9.0}, [0, 1, 2, 3, 4], "none is from 9 s"),
        ({"max_frames": 0}, None, "max_frames is 0"),
        ({"start": float("nan")}, [0, 1, 2, 3, 4], "start is nan"),
        ({}, [0, 1, 2, 3, float("nan")], "a timestamp is nan"),
        ({}, [0, 1, 2, 3, 10**400], "timestamps are not seconds"),
        ({}, 5, "timestamps are not seconds"),
        ({}, ["a"] * 5, "timestamps are not seconds"),
        ({}, [1.0], "5 frames but 1 timestamps"),
    ],
)
def test_options_that_do_not_apply_to_frames_in_memory_are_refused(options, timestamps, message):
    with pytest.raises(InputError, match=message):
        open_media(MediaPart("video", FRAMES, options | {"timestamps": timestamps}), ProcessorConfig())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the list is empty"),
        ((), "the list is empty"),
        (FRAMES[0], r"shape \(20, 30, 3\); give \[frames, height, width, 3\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "the list is empty"),
        (np.full((2, 4, 4, 3), np.nan), "video frame 0 array: float values outside 0..1, or NaN"),
        ([FRAMES[0], FRAMES[0, :, :, :2]], r"video frame 1 array: shape \(20, 30, 2\)"),
        ([FRAMES[0], None], "the video frame 1 cannot be of type NoneType"),
        ([FRAMES[0], b"junk"], "video frame 1 bytes: not a readable image"),
    ],
)
def test_frames_in_memory_that_are_no_images_are_refused(source, message):
    with pytest.raises(InputError, match=message):
        decode(open_video(source))
