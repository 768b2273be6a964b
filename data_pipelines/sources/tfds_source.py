"""Reads TFDS data sets through their random-access data source; TensorFlow is not imported.

Features are those of the official records: `conversations` (a sequence of {from, value}) or one text feature `json`
with the whole annotation; `image`, an image or a sequence of images; `video`, the bytes of a file. A video may also be
a sequence of images, `frames`, with their `timestamps`. A single image stays encoded until it is needed; TFDS itself
decodes sequences.
"""

import contextlib
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.sample_errors import BAD_RECORD, BadSampleError, one_line
from data_pipelines.sources.base import RecordSource, parse_json
from vl3_jax.errors import InputError
from vl3_jax.storage.file_digests import FileDigests

_DEFAULT_SPLIT = "train"
_MEDIA = ("image", "images", "video", "videos", "frames")


def folder_and_split(path: str) -> tuple[str, str]:
    """Splits `folder:train[:50%]` into folder and split; the default split is `train`."""
    match = re.fullmatch(r"(.*?)(?::(\w+(?:\[.*\])?))?", path)
    return match[1], match[2] or _DEFAULT_SPLIT


class TfdsSource(RecordSource):
    """A split of a prepared data set: `folder/name/1.0.0` or `folder/name/1.0.0:train[:50%]`."""

    def __init__(self, path: str):
        super().__init__(path)
        self._folder, self._split = folder_and_split(path)
        self._length = len(self._open_data)

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> dict[str, Any]:
        try:
            return _fields(self._open_data[index])
        except BadSampleError:
            raise
        except Exception as error:  # TFDS does not wrap the exceptions of its file formats
            raise BadSampleError(BAD_RECORD, f"cannot be read ({one_line(error)})") from error

    def fingerprint(self, digests: FileDigests) -> list:
        info = self._open_builder.info
        return ["tfds", info.full_name, self._split, len(self), info.splits[self._split.split("[")[0]].num_bytes]

    @functools.cached_property
    def _open_builder(self):
        try:
            import tensorflow_datasets as tfds

            return tfds.builder_from_directory(self._folder)
        except ImportError as error:
            raise InputError(f"{self.path}: needs `pip install tensorflow-datasets` ({error})") from error
        except Exception as error:
            reason = f"not a prepared TFDS data set ({one_line(error)}); give its version folder"
            raise InputError(f"{self.path}: {reason}") from error

    @functools.cached_property
    def _open_data(self):
        import tensorflow_datasets as tfds

        features = self._open_builder.info.features
        single = "image" in features and isinstance(features["image"], tfds.features.Image)
        skip = {"image": tfds.decode.SkipDecoding()} if single else None
        try:
            return self._open_builder.as_data_source(self._split, decoders=skip)
        except Exception as error:
            raise InputError(f"{self.path}: split {self._split!r} cannot be opened ({one_line(error)})") from error


def _fields(features: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: _plain(value) for name, value in features.items() if name not in _MEDIA}
    if isinstance(fields.get("json"), str):
        annotation = parse_json(fields.pop("json").encode(), 'the feature "json"')
        if not isinstance(annotation, dict):
            raise BadSampleError(BAD_RECORD, f'the feature "json" holds a {type(annotation).__name__}, not an object')
        fields |= annotation
    fields |= {key: _as_list(features[key]) for key in _MEDIA if key in features}
    if "frames" in fields:
        fields["video"] = [fields.pop("frames")]
    return fields


def _as_list(value: Any) -> list[Any]:
    """Returns one or several media as a list; an array is an image unless its dtype is object."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if isinstance(value, list | tuple):
        return list(value)
    return [value] if len(value) else []


def _plain(value: Any) -> Any:
    """Converts a feature to plain Python values; pixels stay, and bytes are decoded to text where they are UTF-8."""
    if isinstance(value, np.ndarray) and value.ndim > 2:
        return value
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    return value
