"""The source images: handwritten digits and clothes, by name. `images/README.md` describes the file layout."""

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
_MIN_SIDE, _MAX_SIDE = 8, 128  # pixels


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePool:
    """The greyscale source images of one split.

    Attributes:
      images: For each kind, [n, h, w] uint8, light on a dark background.
      by_name: For each kind and name, the indices of its images.
      digest: Hash of the content.
    """

    images: dict[str, np.ndarray]
    by_name: dict[str, dict[str, np.ndarray]]
    digest: str

    def sample(self, rng: np.random.Generator, kind: str, name: str) -> tuple[np.ndarray, int]:
        """Returns a random image of a name, [h, w] uint8, and its index among the images of its kind."""
        indices = self.by_name[kind][name]
        index = int(indices[int(rng.random() * len(indices))])
        return self.images[kind][index], index


def open_image_pool(split: str, path: str | os.PathLike | None = None) -> ImagePool:
    """Opens the source images of a split.

    Args:
      split: "train", "dev" or "test".
      path: An npz file to read instead of the split's own.

    Raises:
      InputError: The split is unknown, or the file is missing or has another layout.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    return _read(os.fspath(path) if path else os.fspath(FOLDER / f"{split}.npz"))


@functools.lru_cache(maxsize=8)
def _read(path: str) -> ImagePool:
    try:
        with np.load(path) as content:
            arrays = {name: content[name] for name in content.files}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of images; check the path") from None
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an npz file of images ({' '.join(str(error).split())})") from None
    images_by_kind, by_name = {}, {}
    digest = hashlib.blake2b(digest_size=8)
    for kind in _KINDS:
        images, labels = (arrays.get(f"{kind}_{part}") for part in ("images", "labels"))
        _validate(path, kind, images, labels)
        images_by_kind[kind] = images
        by_name[kind] = {name: np.flatnonzero(labels == label) for label, name in enumerate(NAMES[kind])}
        digest.update(np.ascontiguousarray(images))
        digest.update(np.ascontiguousarray(labels, np.uint8))
    return ImagePool(images_by_kind, by_name, digest.hexdigest())


def _validate(path: str, kind: str, images: np.ndarray | None, labels: np.ndarray | None) -> None:
    names = f"{kind}_images and {kind}_labels"
    if images is None or labels is None:
        raise InputError(f"{path}: lacks {names}; see data_pipelines/synthetic/images/README.md")
    if images.ndim != 3 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise InputError(
            f"{path}: {names} are {images.dtype} {images.shape} and {labels.shape}; give [n, h, w] uint8 and [n]"
        )
    if not all(_MIN_SIDE <= side <= _MAX_SIDE for side in images.shape[1:]):
        raise InputError(
            f"{path}: {kind}_images have {images.shape[1:]} pixels; give {_MIN_SIDE} to {_MAX_SIDE} per side"
        )
    if labels.dtype.kind not in "iu" or sorted(set(labels.tolist())) != list(range(10)):
        raise InputError(f"{path}: {kind}_labels must be 0 to 9, each at least once")
    if images.max(axis=(1, 2), initial=0).min(initial=255) < 64:
        raise InputError(f"{path}: one of {kind}_images has no pixel lighter than 64; leave empty images out")
