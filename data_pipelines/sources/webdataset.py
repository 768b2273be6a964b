"""Reads WebDataset tar files by byte offset: random access without unpacking and without a library.

The members of a sample share their path up to the first dot of the file name. The annotation is the `.json` member, in
the official format; media that it names are looked up among the members, and if it names none, all image and video
members belong to the sample, in the order of the tar. A `.txt` without `.json` is the caption of the sample's images.
"""

import os
import tarfile
from typing import Any

from data_pipelines.sample_errors import BAD_RECORD, MISSING, NOT_UTF8, BadSampleError
from data_pipelines.sources.base import ByteFile, RecordSource, parse_json
from vl3_jax.errors import InputError

_SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "video": (".mp4", ".webm", ".mkv", ".avi", ".mov"),
}


class WebDataset(RecordSource):
    """One tar file. A truncated tar yields the samples before the cut, and an error for the last one."""

    KIND = "webdataset"

    def __init__(self, path: str):
        super().__init__(path)
        if path.endswith((".gz", ".tgz", ".zst", ".bz2", ".xz")):
            raise InputError(f"{path}: a compressed tar has no random access; unpack it to .tar")
        self._file = ByteFile(path)
        self._samples = _samples(path, self._file.size)

    def __len__(self) -> int:
        return len(self._samples)

    def where(self, index: int) -> str:
        return f"{self.path}, sample {self._samples[index][0]}"

    def read(self, index: int) -> dict[str, Any]:
        members = self._samples[index][1]
        annotation = next((name for name in members if name.endswith(".json")), None)
        fields = parse_json(self._read(annotation, members), annotation) if annotation else self._captioned(members)
        if not isinstance(fields, dict):
            raise BadSampleError(BAD_RECORD, f"{annotation} holds a {type(fields).__name__}, not an object")
        named = {kind: fields.get(kind) for kind in _SUFFIXES}
        for kind, suffixes in _SUFFIXES.items():
            wanted = named[kind] or []
            if not any(named.values()):
                wanted = [name for name in members if name.lower().endswith(suffixes)]
            wanted = [wanted] if isinstance(wanted, str) else wanted
            fields[kind] = [{"path": name, "bytes": self._medium(name, members)} for name in wanted]
        return fields

    def _captioned(self, members: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """Returns the fields of a sample whose annotation is a caption."""
        name = next((name for name in members if name.endswith(".txt")), None)
        if name is None:
            raise BadSampleError(BAD_RECORD, "neither a .json nor a .txt member; add the annotation")
        try:
            text = self._read(name, members).decode().strip()
        except UnicodeDecodeError:
            raise BadSampleError(NOT_UTF8, f"{name} is not UTF-8") from None
        return {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": text}]}

    def _medium(self, name: Any, members: dict[str, tuple[int, int]]) -> bytes:
        member = next((member for member in members if member == name or os.path.basename(member) == name), None)
        if member is None:
            raise BadSampleError(MISSING, f"{name} is not in the tar among the members of its sample")
        return self._read(member, members)

    def _read(self, name: str, members: dict[str, tuple[int, int]]) -> bytes:
        start, length = members[name]
        content = self._file.read(start, start + length)
        if len(content) < length:
            raise BadSampleError(BAD_RECORD, f"{name} is cut off; download the tar again")
        return content


def _samples(path: str, size: int) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Returns for each sample its key and its members, {name: (start, length)}, in the order of the tar."""
    import fsspec

    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # otherwise TarFile keeps every header in memory
                if member.isfile():
                    folder, base = os.path.split(member.name)
                    key = os.path.join(folder, base.split(".", 1)[0])
                    samples.setdefault(key, {})[member.name] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        if not samples:
            raise InputError(f"{path}: not a readable tar file ({error}); download it again") from None
    return list(samples.items())
