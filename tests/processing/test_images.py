"""Tests of image reading: every kind of image becomes upright RGB or is refused with the file's name."""

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
from vl3_jax.processing import images, png_chunks, png_strips, rgb_pixels
from vl3_jax.processing.images import open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (21, 33, 4), np.uint8)


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def load_pixels(source):
    reader = open_image(source)
    array = np.asarray(reader.load())
    assert array.shape == (reader.height, reader.width, 3)
    return array


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "F"])
def test_modes_are_converted_as_in_pillow(mode):
    image = Image.fromarray(PIXELS[..., :3])
    image = image.convert("RGB").convert("L").convert(mode) if mode in ("LAB", "F") and mode == "F" else image
    if mode == "LAB":
        image = Image.frombytes("LAB", (33, 21), PIXELS[..., :3].tobytes())
    image = image.convert(mode)
    np.testing.assert_array_equal(load_pixels(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.fromarray(PIXELS[..., :3]).convert("CMYK"), "JPEG"),  # inverted, as Adobe does
        encode(Image.fromarray(PIXELS[..., :3]), "PNG"),
        encode(Image.fromarray(PIXELS[..., :3]).quantize(16), "PNG"),
        encode(Image.fromarray(PIXELS[..., :3]).convert("1"), "PNG"),
        encode(Image.fromarray(PIXELS[..., :3]), "WEBP", lossless=True),
        encode(Image.fromarray(PIXELS[..., :3]), "AVIF"),
        encode(Image.fromarray(PIXELS[..., :3]), "TIFF", save_all=True, append_images=[Image.new("L", (3, 3))]),
        encode(Image.fromarray(PIXELS[..., :3]), "MPO", save_all=True, append_images=[Image.new("RGB", (3, 3))]),
        encode(Image.fromarray(PIXELS[..., :3]), "BMP"),
        encode(Image.fromarray(PIXELS[..., :3]), "JPEG2000"),
        encode(Image.fromarray(PIXELS[..., :3]), "PPM"),
    ],
)
def test_files_are_converted_as_in_pillow(data, tmp_path):
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    (tmp_path / "image").write_bytes(data)
    for source in (data, io.BytesIO(data), tmp_path / "image", str(tmp_path / "image")):
        np.testing.assert_array_equal(load_pixels(source), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(PIXELS[..., :3]), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(load_pixels(data), np.asarray(expected))
    np.testing.assert_array_equal(load_pixels(open_image(data).load()), np.asarray(expected))


def test_sixteen_bit_grey_keeps_its_upper_byte():
    grey_16 = (np.arange(21 * 33).reshape(21, 33) * 90).astype(np.uint16)
    for source in (grey_16, encode(Image.fromarray(grey_16), "PNG"), encode(Image.fromarray(grey_16), "TIFF")):
        np.testing.assert_array_equal(load_pixels(source), np.repeat((grey_16 >> 8)[..., None], 3, -1))


@pytest.mark.parametrize("name", ["city.gif", "city.webp"])
def test_the_first_frame_of_an_animation_is_used(name):
    path = MEDIA / "edge" / name
    np.testing.assert_array_equal(load_pixels(path), np.asarray(Image.open(path).convert("RGB")))


def test_arrays_are_converted_to_rgb():
    rgb = PIXELS[..., :3]
    for source in (rgb, rgb.astype(np.float32) / 255, np.asfortranarray(rgb), rgb.astype(np.uint16) << 8):
        np.testing.assert_array_equal(load_pixels(source), rgb)
    for source in (rgb[..., 0], rgb[..., :1]):
        np.testing.assert_array_equal(load_pixels(source), np.repeat(rgb[..., :1], 3, -1))
    np.testing.assert_array_equal(load_pixels(PIXELS), load_pixels(Image.fromarray(PIXELS)))


@pytest.mark.parametrize("library", ["jax.numpy", "torch"])
def test_anything_with_array_is_an_image(library):
    """Channels may come first, as in torch."""
    rgb = np.ascontiguousarray(PIXELS[..., :3])
    asarray = pytest.importorskip(library).asarray
    for source in (asarray(rgb), asarray(np.moveaxis(rgb, -1, 0).copy()), asarray(rgb.astype(np.float32) / 255)):
        np.testing.assert_array_equal(load_pixels(source), rgb)


def test_low_precision_floats_are_an_image():
    import jax.numpy as jnp

    source = jnp.asarray([[0.0, 0.5], [1.0, 0.25]], jnp.bfloat16)
    np.testing.assert_array_equal(load_pixels(source)[..., 0], [[0, 128], [255, 64]])


def test_an_array_that_cannot_be_read_is_refused_with_the_reason():
    torch = pytest.importorskip("torch")
    for source in (torch.zeros(4, 4, requires_grad=True), torch.zeros(4, 4, dtype=torch.bfloat16)):
        with pytest.raises(InputError, match="image array: Tensor is not readable as an array") as caught:
            open_image(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", "missing.png: no such image file"),
        (str(MEDIA), "is a folder"),
        (b"not an image", "image bytes: not a readable image"),
        (encode(Image.fromarray(PIXELS), "PNG")[:-300], "image bytes: damaged image"),
        (encode(Image.fromarray(PIXELS[..., :3]), "JPEG")[:-300], "image bytes: damaged image"),
        (PIXELS[None], r"shape \(1, 21, 33, 4\)"),
        (PIXELS.astype(np.float32), "float values outside 0..1"),
        (np.full((4, 4), np.nan), "float values outside 0..1, or NaN"),
        (PIXELS.astype(np.int64), "type int64"),
        (np.array([[2**70]], object), "type object"),
        (np.zeros((5, 4, 7), np.uint8), r"shape \(5, 4, 7\)"),
        (np.int64(3), r"shape \(\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (42, "cannot be of type int"),
    ],
)
def test_invalid_images_are_refused_with_a_one_line_error(source, message):
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
    reader = open_image(encode(image, "PNG"))
    assert (reader.height, reader.width) == (403, 301)
    assert "301 x 403 pixels, decoded at 1/4 of its size" in reader.warnings[0]
    expected = np.asarray(rgb_pixels.to_rgb(image)[0].reduce(4))
    np.testing.assert_array_equal(np.asarray(reader.load()), expected)
    assert len(reader.warnings) == 1 + (mode in ("LA", "RGBA"))


def test_a_large_jpeg_is_decoded_at_a_fraction(monkeypatch):
    monkeypatch.setattr(images, "MAX_WHOLE_PIXELS", 100_000)
    monkeypatch.setattr(images, "MAX_REDUCED_PIXELS", 10_000)
    image = ramp("RGB")
    reader = open_image(encode(image, "JPEG", quality=95))
    assert (reader.height, reader.width) == (403, 301)
    reduced = reader.load()
    assert reduced.size == (76, 101)
    assert (
        abs(np.asarray(reduced).astype(int)[:100, :75] - np.asarray(image.reduce(4)).astype(int)[:100, :75]).mean() < 3
    )


@pytest.mark.parametrize(
    "data",
    [
        encode(ramp("RGB"), "WEBP"),
        encode(ramp("RGB"), "JPEG", progressive=True),
        encode(Image.fromarray(np.zeros((403, 301), np.uint16)), "PNG"),
    ],
)
def test_a_large_image_that_cannot_be_reduced_is_refused(data, monkeypatch):
    monkeypatch.setattr(images, "MAX_WHOLE_PIXELS", 100_000)
    with pytest.raises(InputError, match=r"301 x 403 pixels are too many to decode.*save it smaller"):
        open_image(data)


@pytest.mark.parametrize(
    ("mode", "transparency"), [("P", 7), ("P", bytes(range(200))), ("L", 120), ("RGB", (120, 240, 135))]
)
def test_a_large_png_with_a_transparent_colour_is_reduced_on_white(mode, transparency, monkeypatch):
    monkeypatch.setattr(images, "MAX_WHOLE_PIXELS", 100_000)
    monkeypatch.setattr(images, "MAX_REDUCED_PIXELS", 10_000)
    data = encode(ramp(mode), "PNG", transparency=transparency)
    expected = rgb_pixels.to_rgb(Image.open(io.BytesIO(data)))[0].reduce(4)
    reader = open_image(data)
    np.testing.assert_array_equal(np.asarray(reader.load()), np.asarray(expected))
    assert "transparent; shown on white" in reader.warnings[1]


def test_an_icon_that_holds_a_larger_image_is_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_WHOLE_PIXELS", 600)
    picture = encode(Image.new("RGB", (30, 30)), "PNG")
    icon = struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(picture), 22) + picture
    with pytest.raises(InputError, match="30 x 30 pixels are too many"):
        open_image(icon)


def test_a_png_of_endless_rows_is_refused():
    """A single row would take a gigabyte."""
    header = struct.pack(">IIBBBBB", 2**30, 2, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    with pytest.raises(InputError, match="1073741824 x 2 pixels are too many"):
        open_image(png_chunks.MAGIC + b"".join(png_chunks.encode(*chunk) for chunk in chunks))


def test_a_large_damaged_png_is_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_WHOLE_PIXELS", 100_000)
    with pytest.raises(InputError, match="damaged image"):
        open_image(encode(ramp("RGB"), "PNG")[:-1000]).load()


@pytest.mark.slow
def test_a_png_of_400_megapixels_stays_below_half_a_gigabyte(tmp_path):
    """The whole image would take 1.6 GB."""
    side = 20_000
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    compressor = zlib.compressobj(1)
    row = b"\1" + bytes([7, 1, 2] * side)
    data = b"".join([*(compressor.compress(row) for _ in range(side)), compressor.flush()])
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    (tmp_path / "huge.png").write_bytes(png_chunks.MAGIC + b"".join(png_chunks.encode(*chunk) for chunk in chunks))
    code = (
        "import sys; from vl3_jax.processing.images import open_image\n"
        "def peak(): return [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')][0]\n"
        "idle = peak(); reader = open_image(sys.argv[1]); reader.load(); print(reader.height, peak() - idle)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "huge.png"], capture_output=True, text=True, check=True
    )
    height, kilobytes = map(int, run.stdout.split())
    assert height == side
    assert kilobytes < 500_000
