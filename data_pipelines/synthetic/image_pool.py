"""The real pictures: handwritten digits and things to wear, by name. The file layout is in `images/README.md`."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import zipfile

import numpy as np

from data_pipelines.synthetic.vocabulary import NAMES
from vl3_jax.errors import InputError

SPLITS = ("train", "dev", "test")
FOLDER = pathlib.Path(__file__).parent / "images"
_KINDS = ("digit", "fashion")
_SIDES = (8, 128)


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePool:
    """Grey pictures of one split.

    Attributes:
      images: by kind, [n, h, w] uint8, light on a dark ground.
      by_name: by kind and name, the numbers of its pictures.
      digest: of the content.
    """

    images: dict[str, np.ndarray]
    by_name: dict[str, dict[str, np.ndarray]]
    digest: str

    def draw(self, rng: np.random.Generator, kind: str, name: str) -> tuple[np.ndarray, int]:
        """One picture of a name, [h, w] uint8, and its number among those of its kind."""
        numbers = self.by_name[kind][name]
        number = int(numbers[int(rng.random() * len(numbers))])
        return self.images[kind][number], number


def open_image_pool(split: str, pictures: str | os.PathLike | None = None) -> ImagePool:
    """The pictures of a split, or those of another file.

    Raises:
      InputError: an unknown split; the file is missing or not of this layout.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    return _read(os.fspath(pictures) if pictures else os.fspath(FOLDER / f"{split}.npz"))


@functools.lru_cache(maxsize=8)
def _read(path: str) -> ImagePool:
    try:
        with np.load(path) as content:
            arrays = {name: content[name] for name in content.files}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of pictures; check the path") from None
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an npz file of pictures ({' '.join(str(error).split())})") from None
    images, by_name = {}, {}
    digest = hashlib.blake2b(digest_size=8)
    for kind in _KINDS:
        pictures, labels = (arrays.get(f"{kind}_{part}") for part in ("images", "labels"))
        _check(path, kind, pictures, labels)
        images[kind] = pictures
        by_name[kind] = {name: np.flatnonzero(labels == label) for label, name in enumerate(NAMES[kind])}
        digest.update(np.ascontiguousarray(pictures))
        digest.update(np.ascontiguousarray(labels, np.uint8))
    return ImagePool(images, by_name, digest.hexdigest())


def _check(path: str, kind: str, pictures: np.ndarray | None, labels: np.ndarray | None) -> None:
    names = f"{kind}_images and {kind}_labels"
    if pictures is None or labels is None:
        raise InputError(f"{path}: lacks {names}; see data_pipelines/synthetic/images/README.md")
    if pictures.ndim != 3 or pictures.dtype != np.uint8 or labels.shape != pictures.shape[:1]:
        raise InputError(
            f"{path}: {names} are {pictures.dtype} {pictures.shape} and {labels.shape}; give [n, h, w] uint8 and [n]"
        )
    low, high = _SIDES
    if not all(low <= side <= high for side in pictures.shape[1:]):
        raise InputError(f"{path}: {kind}_images have {pictures.shape[1:]} pixels; give {low} to {high} each way")
    if labels.dtype.kind not in "iu" or sorted(set(labels.tolist())) != list(range(10)):
        raise InputError(f"{path}: {kind}_labels must be 0 to 9, each at least once")
    if pictures.max(axis=(1, 2), initial=0).min(initial=255) < 64:
        raise InputError(f"{path}: one of {kind}_images shows nothing lighter than 64; leave empty ones out")
