"""Masks of objects in files: pictures, arrays, run lengths in COCO's compressed form, and one JSON object of all.

A run-length encoding is `{"size": [height, width], "counts": "..."}`, as `pycocotools.mask.decode` reads it.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from vl3_jax.errors import InputError, printable
from vl3_jax.processing.output_files import refuse_unwritable

_NAME_BYTES = 100  # a file system allows 255
_MOST_PIXELS = 2**28  # of a mask that is read


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Returns the run lengths of a mask, [h, w] bool."""
    encoded = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(encoded["size"]), "counts": cast(bytes, encoded["counts"]).decode("ascii")}


def decode_rle(encoded: Mapping[str, Any]) -> np.ndarray:
    """Returns the mask, [h, w] bool, of run lengths in COCO's compressed form, or of a list of their numbers.

    They may come from anywhere; pycocotools writes beyond its memory where they are longer than the mask.

    Raises:
      ValueError: They are no run lengths of a mask of this size.
    """
    counts, (height, width) = encoded["counts"], encoded["size"]
    lengths = _uncompressed(counts) if isinstance(counts, str | bytes) else np.asarray(counts)
    if not (isinstance(height, int) and isinstance(width, int) and 0 <= height * width <= _MOST_PIXELS):
        raise ValueError(f"a mask of {height} x {width} pixels; expected whole numbers, and at most {_MOST_PIXELS}")
    if lengths.dtype.kind not in "iu" or lengths.ndim != 1 or np.any(lengths < 0) or lengths.sum() != height * width:
        raise ValueError(f"the run lengths are not those of {height} x {width} pixels")
    columns = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height)
    return np.ascontiguousarray(columns.T)


def _uncompressed(counts: str | bytes) -> np.ndarray:
    """Returns the run lengths, [n] int64, of COCO's text: numbers of 5 bits a character, mostly differences."""
    text = counts.encode(errors="surrogatepass") if isinstance(counts, str) else counts
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    last = codes & 32 == 0  # characters that end a number
    starts = np.flatnonzero(np.append(True, last[:-1]))
    digits = np.arange(len(codes)) - np.repeat(starts, np.diff(np.append(starts, len(codes))))
    if not last[-1] or np.any((codes < 0) | (codes > 63)) or digits.max() > 6:
        raise ValueError("the text has no whole numbers of COCO's run lengths")
    numbers = np.add.reduceat((codes & 31) << 5 * digits, starts)
    numbers -= np.where(codes[last] & 16, 32 << 5 * digits[last], 0)
    for first in (1, 2):  # each is the difference to the one before the last, but for the first three
        numbers[first::2] = numbers[first::2].cumsum()
    return numbers


def mask_entry(mask: np.ndarray, score: float, presence: float) -> dict[str, Any]:
    """Returns a mask, [h, w] bool, as JSON values.

    Args:
      mask: The mask.
      score: Its predicted IoU.
      presence: Logit of the object being there.
    """
    return encode_rle(mask) | {"score": round(float(score), 6), "object_score": round(float(presence), 6)}


def _save_png(path: pathlib.Path, mask: np.ndarray) -> None:
    Image.fromarray(mask.astype(np.uint8) * 255).save(path, compress_level=1)


def _save_rle(path: pathlib.Path, mask: np.ndarray) -> None:
    path.write_text(json.dumps(encode_rle(mask)))


# What a mask is saved as, by the ending of its file.
_WRITERS: dict[str, Callable[[pathlib.Path, np.ndarray], None]] = {"png": _save_png, "npy": np.save, "json": _save_rle}
MASK_FORMATS = tuple(_WRITERS)


def save_mask(
    folder: str | os.PathLike, obj: int | str, frame: int, mask: np.ndarray, mask_format: str = "png"
) -> None:
    """Writes a mask to FOLDER/OBJECT/FRAME.png, .npy or .json.

    Args:
      folder: Folder that exists.
      obj: Number or name of the object.
      frame: Index of the frame.
      mask: The mask, [h, w] bool; a picture has 0 and 255.
      mask_format: One of `MASK_FORMATS`: a picture, an array of bool, or run lengths.

    Raises:
      InputError: The file cannot be written.
    """
    path = pathlib.Path(folder) / str(obj) / f"{frame}.{mask_format}"
    with refuse_unwritable(path):
        path.parent.mkdir(exist_ok=True)
        _WRITERS[mask_format](path, mask)


def check_object_name(name: str) -> None:
    """Raises InputError for a name of an object that no folder can have on every system."""
    forbidden = not name or name.startswith(".") or name != name.strip() or any(c in name for c in '/\\:*?"<>|')
    if forbidden or not name.isprintable() or len(name.encode(errors="surrogateescape")) > _NAME_BYTES:
        raise InputError(f"object {printable(repr(name), 60)}; give a number or a short name that a folder may have")


class MaskTable:
    """The run lengths of all masks as JSON, by object and frame, held on the disk until they are written."""

    def __init__(self, folder: str | os.PathLike):
        """Starts without masks.

        Args:
          folder: Folder whose disk holds them; no file is to be seen there.
        """
        self._folder, self._files = folder, contextlib.ExitStack()
        self._entries: dict[str, IO[str]] = {}

    def __enter__(self) -> "MaskTable":
        return self

    def __exit__(self, *_: Any) -> None:
        self._files.close()

    def add(self, obj: int | str, frame: int, entry: Mapping[str, Any]) -> None:
        """Adds a mask as `mask_entry` describes it; each object has one mask in a frame.

        Raises:
          InputError: The disk is full.
        """
        with refuse_unwritable(self._folder):
            file = self._entries.get(str(obj))
            if file is None:
                file = self._entries[str(obj)] = tempfile.TemporaryFile("w+", dir=self._folder, encoding="ascii")  # noqa: SIM115
                self._files.enter_context(file)
            separator = ", " if file.tell() else ""
            file.write(f'{separator}"{frame}": {json.dumps(entry)}')

    def write_json(self, file: IO[str], head: Mapping[str, Any]) -> None:
        """Writes one JSON object, in one line: the values of `head`, and `masks` by object and frame."""
        file.write(json.dumps(head)[:-1] + ', "masks": {')
        for number, (obj, entries) in enumerate(self._entries.items()):
            file.write(f"{', ' if number else ''}{json.dumps(obj)}: {{")
            entries.seek(0)
            shutil.copyfileobj(entries, file)
            file.write("}")
        file.write("}}\n")
