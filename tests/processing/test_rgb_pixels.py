"""Tests of the conversion to RGB: transparency is shown on white, and values of any range become visible."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from support.media import AWKWARD
from vl3_jax.errors import InputError
from vl3_jax.processing import png_chunks
from vl3_jax.processing.images import open_image
from vl3_jax.processing.rgb_pixels import TRANSPARENT, to_rgb

RAMP = np.linspace(0, 1, 60 * 40, dtype=np.float32).reshape(40, 60)
BLACK_IS_ZERO, WHITE_IS_ZERO = 1, 0
UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def write_tiff(values, bits, sample_format=UNSIGNED, photometric=BLACK_IS_ZERO):
    """Returns an uncompressed TIFF of grey values [h, w], which are packed already if they are bytes [h, n]."""
    height, data = len(values), values.tobytes()
    width = values.shape[1] * values.itemsize * 8 // bits
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in {**tags, 339: sample_format}.items()]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def load_grey(data):
    """Returns the pixels of a grey image, and the warnings of its reader."""
    reader = open_image(data)
    red, green, blue = np.moveaxis(np.asarray(reader.load()).astype(int), -1, 0)
    assert (red == green).all()
    assert (red == blue).all()
    return red, reader.warnings


def test_ink_on_a_transparent_ground_equals_ink_on_white():
    reader = open_image(AWKWARD / "ink_rgba.png")
    np.testing.assert_array_equal(np.asarray(reader.load()), np.asarray(open_image(AWKWARD / "ink_white.png").load()))
    assert reader.warnings == [f"{AWKWARD / 'ink_rgba.png'}: {TRANSPARENT}"]
    reader.load()
    assert len(reader.warnings) == 1


def test_every_alpha_and_colour_equals_pillows_composition():
    alpha, colour = np.indices((256, 256), np.uint8)
    image = Image.fromarray(np.stack([colour, 255 - colour, alpha, alpha], -1))
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    np.testing.assert_array_equal(np.asarray(to_rgb(image)[0]), np.asarray(expected))


def test_an_opaque_image_is_not_called_transparent():
    image = Image.new("RGBA", (5, 5), (1, 2, 3, 255))
    rgb, remark = to_rgb(image)
    assert (rgb.getpixel((0, 0)), remark) == ((1, 2, 3), None)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (write_tiff(RAMP, 32, FLOAT), RAMP * 255),
        (write_tiff(RAMP, 32, FLOAT, WHITE_IS_ZERO), 255 - RAMP * 255),
        (write_tiff((RAMP * 65535).astype(np.uint16), 16), RAMP * 255),
        (write_tiff((RAMP * 65535).astype(np.uint16), 16, UNSIGNED, WHITE_IS_ZERO), 255 - RAMP * 255),
        (write_tiff((RAMP * 65535).astype(np.int32), 32, SIGNED), RAMP * 255),
        (write_tiff((RAMP * 255).round(), 32, FLOAT), RAMP * 255),
        (b"P5 60 40 4095\n" + (RAMP * 4095).astype(">u2").tobytes(), RAMP * 255),
    ],
    ids=["float", "float, white is 0", "16 bits", "16 bits, white is 0", "32 bits", "float bytes", "12 bits in PGM"],
)
def test_grey_of_more_than_eight_bits_keeps_its_brightness(data, expected):
    grey, warnings = load_grey(data)
    assert np.abs(grey - expected).max() <= 1
    assert not warnings


def test_grey_of_twelve_bits_is_scaled():
    values = (RAMP * 4095).astype(int)
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).reshape(40, -1)
    grey, _ = load_grey(write_tiff(packed.astype(np.uint8), 12))
    np.testing.assert_array_equal(grey, values >> 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (write_tiff(RAMP * 800 - 3, 32, FLOAT), "values from -3 to 797"),
        (write_tiff(RAMP * 2, 32, FLOAT), "values from 0 to 2"),
        (write_tiff((RAMP * 1e9).astype(np.int32), 32, SIGNED), "values from 0 to 1e+09"),
        (write_tiff((RAMP * np.float64(6e38) - 3e38).astype(np.float32), 32, FLOAT), "values from -3e+38 to 3e+38"),
        (b"Pf\n60 40\n-1.0\n" + (RAMP[::-1] * 5).tobytes(), "values from 0 to 5"),
    ],
)
def test_values_of_any_range_are_scaled_with_a_note(data, message):
    grey, (warning,) = load_grey(data)
    assert np.abs(grey - RAMP * 255).max() <= 1
    assert message in warning


def test_a_constant_is_shown():
    grey, (warning,) = load_grey(write_tiff(np.full((4, 4), 7.5, np.float32), 32, FLOAT))
    assert not grey.any()
    assert "values from 7.5 to 7.5" in warning


def test_large_integers_keep_their_differences():
    grey, _ = load_grey(write_tiff((10**9 + RAMP.astype(np.float64) * 255).astype(np.int32), 32, SIGNED))
    assert np.abs(grey - RAMP * 255).max() <= 1


def test_a_float_image_is_as_bright_as_its_values():
    grey, warnings = load_grey(AWKWARD / "f01.tif")
    with Image.open(AWKWARD / "f01.tif") as image:
        np.testing.assert_array_equal(grey, np.round(np.asarray(image) * 255))
    assert not warnings


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(value):
    values = RAMP.copy()
    values[3, 3] = value
    with pytest.raises(InputError, match="some pixels are not numbers"):
        open_image(write_tiff(values, 32, FLOAT)).load()


def test_a_transparent_grey_of_sixteen_bits_is_white():
    values = np.array([[30_000, 30_001]], np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", transparency=30_000)
    grey, (warning,) = load_grey(file.getvalue())
    assert grey.tolist() == [[255, 30_001 >> 8]]
    assert TRANSPARENT in warning


def test_sixteen_bit_colour_keeps_its_upper_byte():
    row = np.array([[0x1234, 0xABCD, 0x00FF], [0xFFFF, 0x8000, 0x7FFF]], ">u2")
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" + row.tobytes())),
        (b"IEND", b""),
    ]
    data = png_chunks.MAGIC + b"".join(png_chunks.encode(*chunk) for chunk in chunks)
    np.testing.assert_array_equal(np.asarray(open_image(data).load())[0], row >> 8)
