"""Opens files of pixels with Pillow, as far as a file from a stranger may be opened.

Only the formats of `FORMATS` are read, each by its own reader: pictures that decode to pixels without starting another
program or opening another file, as EPS (Ghostscript) and WMF do, and that begin with a signature. Metadata that cannot
be read counts as absent, and whatever else Pillow raises becomes an `InputError` with the reason.
"""

import contextlib
import io
import re
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO
from warnings import catch_warnings, simplefilter

from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from vl3_jax.errors import InputError
from vl3_jax.processing import png_chunks

# Pillow's name of each format, and the ends of names that its files have.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "ICO": (".ico",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
EXTENSIONS = frozenset(extension for extensions in FORMATS.values() for extension in extensions)
_ORIENTATION = 0x0112
_AVIF_EXIF = re.compile(rb"(infe.{8})Exif", re.DOTALL)  # the entry in the list of what an AVIF holds
_REASON_LENGTH = 200
_MAX_METADATA = 2**20  # bytes of a chunk; more is no description of a picture
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTED_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # how texts begin that state an orientation


@contextlib.contextmanager
def refuse_unreadable(name: str, what: str = "image") -> Iterator[None]:
    """Turns whatever a library raises within the context into an `InputError` that begins with `name` and says why."""
    try:
        with catch_warnings():
            simplefilter("ignore")  # Pillow warns of unusual metadata, which does not affect the pixels
            yield
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{name}: no permission to read it; change its permissions") from error
    except MemoryError as error:
        raise InputError(f"{name}: decoding takes more memory than there is; save the {what} smaller") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: its pixels are too many to decode; save the {what} smaller") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{name}: cannot be read ({error.strerror}); check the file") from error
        raise InputError(f"{name}: damaged {what} ({_reason(error)}); replace the file") from error


@contextlib.contextmanager
def opened(data: str | bytes, name: str, what: str = "image") -> Iterator[Image.Image]:
    """Opens a file without decoding it; it is closed at the end of the context.

    Pillow's own limit of pixels does not apply to JPEG and PNG, of which larger ones can be decoded in part.

    Args:
      data: Path or content of the file.
      name: Name for messages.
      what: What it should be, for messages.

    Raises:
      InputError: The file cannot be read, is of no format of `FORMATS`, or its header is damaged.
    """
    with contextlib.ExitStack() as files:
        with refuse_unreadable(name, what):
            file = io.BytesIO(data) if isinstance(data, bytes) else files.enter_context(open(data, "rb"))
            format_name = _format_of(file.read(16), name, what)
            file.seek(0)
            reader = _READERS.get(format_name)
            image = reader(file) if reader else Image.OPEN[format_name][0](file, "")
        yield image


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of an image, 1 to 8, which its pixels still need; 1 if it cannot be read."""
    if image.format == "TIFF":  # Pillow rotates TIFF images itself
        return 1
    with contextlib.suppress(Exception), catch_warnings():
        simplefilter("ignore")
        value = int(Image.Image.getexif(image)[_ORIENTATION])  # PNG's own getexif would decode the pixels
        return value if value in range(1, 9) else 1
    return 1


def _reason(error: Exception) -> str:
    """Returns what an exception says, or what it means where Pillow's own words do not help."""
    text = " ".join(str(error).split())[:_REASON_LENGTH] or type(error).__name__
    if isinstance(error, struct.error | IndexError) or isinstance(error.__cause__, struct.error | IndexError):
        return "it breaks off"
    return "its header states no size or no known pixels" if text == "not identified by this driver" else text


def _format_of(head: bytes, name: str, what: str) -> str:
    """Returns the format that a file's first bytes show."""
    Image.init()
    for format_name in FORMATS:
        _, accept = Image.OPEN.get(format_name, (None, None))  # an older Pillow lacks some
        accepted = accept is not None and accept(head)
        if isinstance(accepted, str):  # this build of Pillow cannot read the format
            raise InputError(f"{name}: {accepted}")
        if accepted:
            return format_name
    formats = ", ".join(FORMATS)
    raise InputError(f"{name}: not a readable {what}, its content is none of {formats}; give a file of one of these")


def _open_png(file: BinaryIO) -> Image.Image:
    """Opens a PNG as its pixels alone, so that text, profile and EXIF may be damaged or large; adds EXIF if it can."""
    chunks = list(png_chunks.chunks(file))
    pixels = [chunk for chunk in chunks if chunk.kind in png_chunks.PIXELS]
    image = PngImagePlugin.PngImageFile(png_chunks.view(file, pixels))
    exif = next((png_chunks.read(file, chunk, _MAX_METADATA) for chunk in chunks if chunk.kind == b"eXIf"), None)
    if exif:
        image.info["exif"] = b"Exif\0\0" + exif
    texts = [chunk for chunk in chunks if chunk.kind in _TEXTS and chunk.length <= _MAX_METADATA]
    texts = [chunk for chunk in texts if png_chunks.read(file, chunk, 32).startswith(_ORIENTED_TEXTS)]
    for text in texts:
        with contextlib.suppress(Exception):
            described = PngImagePlugin.PngImageFile(png_chunks.view(file, [pixels[0], text, *pixels[1:]]))
            image.info.update({**described.info, **image.info})  # in place: Pillow holds on to it
    return image


def _open_avif(file: BinaryIO) -> Image.Image:
    """Opens an AVIF, at a second try without its EXIF, which the decoder refuses if it is damaged."""
    factory, _ = Image.OPEN["AVIF"]
    try:
        return factory(file, "")
    except Exception:
        file.seek(0)
        content, found = _AVIF_EXIF.subn(rb"\1free", file.read(), count=1)
        if not found:
            raise
        return factory(io.BytesIO(content), "")


class _TiffImage(TiffImagePlugin.TiffImageFile):
    """A TIFF whose EXIF may be damaged: Pillow reads it while it decodes, of which only the orientation matters."""

    _orientation_only: Image.Exif | None = None

    def getexif(self) -> Image.Exif:
        if self._orientation_only is None:
            self._orientation_only = Image.Exif()
            with contextlib.suppress(Exception):
                self._orientation_only[_ORIENTATION] = super().getexif()[_ORIENTATION]
        return self._orientation_only


_READERS: dict[str, Callable[[BinaryIO], Image.Image]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": _open_png,
    "AVIF": _open_avif,
    "TIFF": _TiffImage,
}
