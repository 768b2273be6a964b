"""Pictures of every kind come out upright and in RGB, or are refused with the file's name."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from support.media import MEDIA
from vl3_jax.errors import InputError
from vl3_jax.processing import images, png_strips
from vl3_jax.processing.images import open_image

PICTURE = np.random.default_rng(0).integers(0, 256, (21, 33, 4), np.uint8)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(source):
    picture = open_image(source)
    array = np.asarray(picture.load())
    assert array.shape == (picture.height, picture.width, 3)
    return array


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "F"])
def test_modes_are_converted_as_pillow_does(mode):
    image = Image.fromarray(PICTURE[..., :3])
    image = image.convert("RGB").convert("L").convert(mode) if mode in ("LAB", "F") and mode == "F" else image
    if mode == "LAB":
        image = Image.frombytes("LAB", (33, 21), PICTURE[..., :3].tobytes())
    image = image.convert(mode)
    np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(PICTURE[..., :3]).convert("CMYK"), "JPEG"),
        saved(Image.fromarray(PICTURE), "PNG"),
        saved(Image.fromarray(PICTURE[..., :3]).quantize(16), "PNG", transparency=3),
        saved(Image.fromarray(PICTURE), "WEBP", lossless=True),
        saved(Image.fromarray(PICTURE), "TIFF"),
        saved(Image.fromarray(PICTURE[..., :3]), "BMP"),
    ],
)
def test_files_are_converted_as_pillow_does(data, tmp_path):
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    (tmp_path / "picture").write_bytes(data)
    for source in (data, io.BytesIO(data), tmp_path / "picture", str(tmp_path / "picture")):
        np.testing.assert_array_equal(pixels(source), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_honoured(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(PICTURE[..., :3]), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(pixels(data), np.asarray(expected))


def test_sixteen_bit_grey_keeps_its_upper_byte():
    deep = (np.arange(21 * 33).reshape(21, 33) * 90).astype(np.uint16)
    for source in (deep, saved(Image.fromarray(deep), "PNG"), saved(Image.fromarray(deep), "TIFF")):
        np.testing.assert_array_equal(pixels(source), np.repeat((deep >> 8)[..., None], 3, -1))


@pytest.mark.parametrize("name", ["city.gif", "city.webp"])
def test_of_an_animation_the_first_frame_is_taken(name):
    path = MEDIA / "edge" / name
    np.testing.assert_array_equal(pixels(path), np.asarray(Image.open(path).convert("RGB")))


def test_arrays():
    rgb = PICTURE[..., :3]
    for source in (rgb, PICTURE, rgb.astype(np.float32) / 255, np.asfortranarray(rgb)):
        np.testing.assert_array_equal(pixels(source), rgb)
    for source in (rgb[..., 0], rgb[..., :1]):
        np.testing.assert_array_equal(pixels(source), np.repeat(rgb[..., :1], 3, -1))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", "missing.png: no such picture file"),
        (str(MEDIA), "is a folder"),
        (b"not a picture", "picture bytes: not a picture"),
        (saved(Image.fromarray(PICTURE), "PNG")[:-300], "picture bytes: damaged picture"),
        (saved(Image.fromarray(PICTURE[..., :3]), "JPEG")[:-300], "picture bytes: damaged picture"),
        (PICTURE[None], r"shape \(1, 21, 33, 4\)"),
        (PICTURE.astype(np.float32), "float values outside 0..1"),
        (PICTURE.astype(np.int64), "type int64"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (42, "cannot be a int"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(source, message):
    with pytest.raises(InputError, match=message) as caught:
        open_image(source).load()
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match=r"empty\.png: the file is empty"):
        open_image(tmp_path / "empty.png")


def ramp(mode, height=403, width=301):
    grey = np.add.outer(np.arange(height), np.arange(width))
    image = Image.fromarray(np.stack([grey, grey * 2, 255 - grey, grey // 2], -1).astype(np.uint8))
    return image.convert("RGB").quantize(200) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA", "P"])
def test_a_large_png_is_reduced_strip_by_strip(mode, monkeypatch):
    monkeypatch.setattr(images, "MAX_WHOLE_PIXELS", 100_000)
    monkeypatch.setattr(images, "MAX_REDUCED_PIXELS", 10_000)
    monkeypatch.setattr(png_strips, "_STRIP_BYTES", 20_000)
    image = ramp(mode)
    picture = open_image(saved(image, "PNG"))
    assert (picture.height, picture.width) == (403, 301)
    assert "301 x 403 pixels, decoded at 1/4 of its size" in picture.notes[0]
    np.testing.assert_array_equal(np.asarray(picture.load()), np.asarray(image.convert("RGB").reduce(4)))


def test_a_large_jpeg_is_decoded_at_a_fraction(monkeypatch):
    monkeypatch.setattr(images, "MAX_WHOLE_PIXELS", 100_000)
    monkeypatch.setattr(images, "MAX_REDUCED_PIXELS", 10_000)
    image = ramp("RGB")
    picture = open_image(saved(image, "JPEG", quality=95))
    assert (picture.height, picture.width) == (403, 301)
    reduced = picture.load()
    assert reduced.size == (76, 101)
    assert (
        abs(np.asarray(reduced).astype(int)[:100, :75] - np.asarray(image.reduce(4)).astype(int)[:100, :75]).mean() < 3
    )


@pytest.mark.parametrize(
    "data",
    [
        saved(ramp("RGB"), "WEBP"),
        saved(ramp("RGB"), "JPEG", progressive=True),
        saved(Image.fromarray(np.zeros((403, 301), np.uint16)), "PNG"),
    ],
)
def test_a_large_picture_that_cannot_be_bounded_is_refused(data, monkeypatch):
    monkeypatch.setattr(images, "MAX_WHOLE_PIXELS", 100_000)
    with pytest.raises(InputError, match=r"301 x 403 pixels are too many to decode.*save it smaller"):
        open_image(data)


def test_a_large_damaged_png_is_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_WHOLE_PIXELS", 100_000)
    with pytest.raises(InputError, match="damaged picture"):
        open_image(saved(ramp("RGB"), "PNG")[:-1000]).load()


@pytest.mark.slow
def test_a_png_of_400_megapixels_stays_below_half_a_gigabyte(tmp_path):
    """Against 1.6 GB for the whole picture."""
    side = 20_000
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    packer = zlib.compressobj(1)
    row = b"\1" + bytes([7, 1, 2] * side)
    data = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_strips._chunk(*chunk) for chunk in chunks))
    code = (
        "import sys; from vl3_jax.processing.images import open_image\n"
        "def peak(): return [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')][0]\n"
        "idle = peak(); picture = open_image(sys.argv[1]); picture.load(); print(picture.height, peak() - idle)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "huge.png"], capture_output=True, text=True, check=True
    )
    height, kilobytes = map(int, run.stdout.split())
    assert height == side
    assert kilobytes < 500_000
