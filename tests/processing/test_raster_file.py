"""Tests of opening files of pixels: damaged metadata is absent, and all else that fails is one line with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from support.media import AWKWARD
from vl3_jax.errors import InputError
from vl3_jax.processing import png_chunks, raster_file
from vl3_jax.processing.images import open_image
from vl3_jax.processing.videos import open_video

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (21, 33, 3), np.uint8))
FORMATS = sorted(raster_file.FORMATS)
GARBAGE_EXIF = [b"Exif\0\0" + b"GARBAGE!" * 4, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(200)), b"", b"Exif\0\0"]


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def load_pixels(source):
    return np.asarray(open_image(source).load())


def refusal(source):
    """Returns the message of an image that is refused."""
    with pytest.raises(InputError) as caught:
        open_image(source).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def complaint(content):
    """Returns the message of an image that may be refused, or nothing."""
    try:
        open_image(content).load()
    except InputError as error:
        return str(error)
    return ""


def png(*extra, pixels=b"\0\x01\x02\x03", size=(1, 1)):
    """Returns a PNG with these chunks in front of its pixels."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return png_chunks.MAGIC + b"".join(png_chunks.encode(*chunk) for chunk in chunks)


@pytest.mark.parametrize("name", ["png_exif_garbage.png", "png_ztxt_2mb.png"])
def test_a_damaged_or_huge_description_leaves_the_picture(name):
    expected = load_pixels(AWKWARD / "plain.jpg").astype(int)
    pixels = load_pixels(AWKWARD / name)
    corners = [(5, 5), (5, -6), (-6, 5), (-6, -6)]
    for corner in corners:
        assert np.abs(pixels[corner] - expected[corner]).max() <= 2


def test_the_orientation_of_a_photo_is_applied():
    plain, turned = load_pixels(AWKWARD / "plain.jpg"), load_pixels(AWKWARD / "exif6.jpg")
    np.testing.assert_array_equal(turned, np.rot90(plain, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("damaged", GARBAGE_EXIF)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_counts_as_absent(kind, damaged):
    expected = load_pixels(encode(PICTURE, kind))
    np.testing.assert_array_equal(load_pixels(encode(PICTURE, kind, exif=damaged)), expected)
    np.testing.assert_array_equal(load_pixels(Image.open(io.BytesIO(encode(PICTURE, kind, exif=damaged)))), expected)


def test_damaged_exif_of_an_avif_leaves_its_own_orientation():
    tags = exif(6)
    tags[0x010E] = "a description"
    data = encode(PICTURE, "AVIF", exif=tags)
    head = data.rindex(b"Exif\0\0") + 6
    damaged = data[:head] + b"XXXX" + data[head + 4 :]
    np.testing.assert_array_equal(load_pixels(damaged), load_pixels(data))
    assert load_pixels(data).shape == (33, 21, 3)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("tags", [{34665: 12_345_678}, {700: b"\xff not XML"}, {34665: 12_345_678, 0x0112: 6}])
def test_damaged_tags_of_a_tiff_count_as_absent(compression, tags):
    expected = load_pixels(encode(PICTURE, "TIFF"))
    pixels = load_pixels(encode(PICTURE, "TIFF", compression=compression, tiffinfo=tags))
    np.testing.assert_array_equal(pixels, np.rot90(expected, -1) if 0x0112 in tags else expected)


@pytest.mark.parametrize(
    "chunk",
    [
        (b"tEXt", b"Comment\0" + bytes(2**21)),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**22))),
        (b"zTXt", b"Comment\0\x07?"),
        (b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + zlib.compress(bytes(2**22))),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 4\nnot hexadecimal")),
        (b"iCCP", b"name\0\x05?"),
        (b"gAMA", b""),
        (b"pHYs", b"\1"),
        (b"eXIf", b"II"),
        (b"fOOo", bytes(100)),
    ],
    ids=lambda chunk: chunk[0].decode(),
)
def test_chunks_that_make_no_pixels_do_no_harm(chunk):
    np.testing.assert_array_equal(load_pixels(png(chunk)), [[[1, 2, 3]]])


def test_a_wrong_checksum_of_a_description_does_no_harm():
    data = png((b"tEXt", b"Comment\0hello"))
    np.testing.assert_array_equal(load_pixels(data.replace(b"hello", b"hallo")), [[[1, 2, 3]]])


@pytest.mark.parametrize("form", ["eXIf", "eXIf behind the pixels", "Raw profile", "XMP"])
def test_an_orientation_is_found_wherever_a_png_states_it(form):
    profile = exif(6).tobytes()
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    raw = b"Raw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(profile)}\n{profile.hex()}".encode())
    bomb = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**22)))
    wide = {"pixels": b"\0\x01\x02\x03\x04\x05\x06", "size": (2, 1)}
    if form == "eXIf behind the pixels":
        end = png_chunks.encode(b"IEND", b"")
        data = png(bomb, **wide).removesuffix(end) + png_chunks.encode(b"eXIf", profile[6:]) + end
    else:
        chunk = {"eXIf": (b"eXIf", profile[6:]), "Raw profile": (b"zTXt", raw), "XMP": (b"iTXt", xmp)}[form]
        data = png(bomb, chunk, **wide)
    np.testing.assert_array_equal(load_pixels(data), [[[1, 2, 3]], [[4, 5, 6]]])


def test_a_png_of_many_chunks_is_read():
    data = encode(PICTURE, "PNG")
    file = io.BytesIO(data)
    pixels = b"".join(file.read(chunk.length) for chunk in png_chunks.chunks(file) if chunk.kind == b"IDAT")
    pieces = [png_chunks.encode(b"IDAT", pixels[i : i + 7]) for i in range(0, len(pixels), 7)]
    first, last = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    np.testing.assert_array_equal(load_pixels(data[:first] + b"".join(pieces) + data[last:]), np.asarray(PICTURE))


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_that_breaks_off_anywhere_is_read_or_refused(kind):
    data = encode(PICTURE, kind)
    for length in range(1, len(data), max(len(data) // 40, 1)):
        message = complaint(data[:length])
        assert "\n" not in message
        assert "convert" not in message


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_read_or_refused(data):
    kind = data.draw(st.sampled_from(FORMATS))
    content = bytearray(encode(PICTURE, kind))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert "\n" not in complaint(bytes(content))


@pytest.mark.parametrize(
    "content",
    [
        (AWKWARD / "eps.jpg").read_bytes(),
        b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\xd7\xcd\xc6\x9a" + bytes(100),  # WMF
        b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(100),
        b"8BPS\0\x01" + bytes(100),
        b"SIMPLE  =                    T" + b" " * 2850,  # FITS
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        b"\0\0\x01\xb3" + bytes(100),  # MPEG
        b"PK\x03\x04" + bytes(100),
        b"plain text",
    ],
)
def test_only_formats_of_pixels_are_opened(content, monkeypatch):
    def run(*arguments, **options):
        raise AssertionError(arguments)

    monkeypatch.setattr("subprocess.Popen", run)
    assert "image bytes: not a readable image, its content is none of JPEG, PNG, GIF" in refusal(content)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("trunc.jpg", r"damaged image (image file is truncated"),
        ("damaged.avif", r"damaged image ("),
        ("png_2e9x2e9.png", "2147483647 x 2147483647 pixels are too many to decode"),
        ("gif_13000x13000x1000.gif", "13000 x 13000 pixels are too many to decode"),
    ],
)
def test_files_that_cannot_be_decoded_say_why(name, reason):
    assert refusal(AWKWARD / name).startswith(f"{AWKWARD / name}: {reason}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png_chunks.MAGIC, "damaged image (it breaks off)"),
        (png(size=(0, 1)), "its header states no size or no known pixels"),
        (png()[:40], "damaged image"),
        (b"P6 0 0 255\n", "its header states no size or no known pixels"),
        (b"BM" + bytes(200), "damaged image (Unsupported BMP header type"),
        (b"GIF89a" + bytes(20), "damaged image"),
    ],
)
def test_headers_without_an_image_say_why(content, reason):
    assert reason in refusal(content)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "no permission to read it"),
        (OSError(5, "Input/output error"), "cannot be read (Input/output error)"),
        (MemoryError(), "decoding takes more memory than there is"),
        (RecursionError("maximum recursion depth exceeded"), "damaged image (maximum recursion depth exceeded)"),
        (struct.error("unpack requires a buffer"), "damaged image (it breaks off)"),
        (zlib.error("Error -3"), "damaged image (Error -3)"),
        (Image.DecompressionBombError("bomb"), "its pixels are too many to decode"),
        (KeyError("unknown"), "damaged image ('unknown')"),
        (AssertionError(), "damaged image (AssertionError)"),
    ],
)
@pytest.mark.parametrize("place", ["_open", "load"])
def test_whatever_pillow_raises_is_one_line(error, message, place, monkeypatch):
    """Tests run as a user who may read everything, so the errors are made."""

    def fail(*_):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, place, fail)
    assert message in refusal(png())


def test_a_file_that_may_not_be_read_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(png())

    def denied(*_):
        raise PermissionError(13, "Permission denied", str(path))

    reader = open_image(path)
    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(InputError, match=r"secret\.png: no permission to read it"):
        reader.load()
    assert "no permission to read it" in refusal(path)
    monkeypatch.undo()
    monkeypatch.setattr("os.scandir", denied)
    with pytest.raises(InputError, match="no permission to read it"):
        open_video(tmp_path)


def test_every_format_is_one_of_pillows():
    Image.init()
    assert set(raster_file.FORMATS) <= set(Image.OPEN)
    known = Image.registered_extensions()
    assert {extension for extension in raster_file.EXTENSIONS if extension not in known} <= {".mpo"}
