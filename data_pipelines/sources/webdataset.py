"""Reads WebDataset tar files by byte offset: random access without unpacking and without a library.

The members of a sample share their path up to the first dot of the file name; where that would give a sample two
annotations, up to the last dot. The annotation is the `.json` member, in one of the layouts of `layouts`; media that it
names are looked up among the members, and if it names none, all image and video members belong to the sample, in the
order of the tar. If the `.json` has no turns, a `.txt` member or its `caption` is the caption of the media.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.layouts import TAG_OF, has_turns, official
from data_pipelines.media_signs import kind_of
from data_pipelines.sample_errors import BAD_RECORD, MISSING, NOT_UTF8, TAGS, BadSampleError, one_line
from data_pipelines.sources.base import ByteFile, RecordSource, parse_json
from vl3_jax.errors import InputError

_ANNOTATION, _CAPTION = ".json", ".txt"
_DOCUMENTS = (".pdf", ".djvu")  # not read, but not to be overlooked either
_LITTER = ("._", ".DS_Store")  # what macOS adds to tars
_CHUNK = 2**20

# The content of a member, its start and length; or why the member cannot be read.
_Place = tuple[int, int] | str


class WebDataset(RecordSource):
    """One tar file, or several joined to one. What is damaged or cut off becomes a bad sample."""

    KIND = "webdataset"

    def __init__(self, path: str):
        super().__init__(path)
        if path.endswith((".gz", ".tgz", ".zst", ".bz2", ".xz")):
            raise InputError(f"{path}: a compressed tar has no random access; unpack it to .tar")
        self._file = ByteFile(path)
        members, faults = _scan(path, self._file)
        self._samples: list[tuple[str, dict[str, _Place]]] = [*_grouped(members).items(), *faults]

    def __len__(self) -> int:
        return len(self._samples)

    def where(self, index: int) -> str:
        return f"{self.path}, sample {self._samples[index][0]}"

    def read(self, index: int) -> dict[str, Any]:
        members = self._samples[index][1]
        fault = next((place for place in members.values() if isinstance(place, str)), None)
        if fault:
            raise BadSampleError(BAD_RECORD, fault)
        annotation, caption = _find(members, _ANNOTATION), _find(members, _CAPTION)
        fields = parse_json(self._content(annotation, members), annotation) if annotation else {}
        if not isinstance(fields, dict):
            raise BadSampleError(BAD_RECORD, f"{annotation} holds a {type(fields).__name__}, not an object")
        media = {kind: [name for name in members if kind_of(name) == kind] for kind in TAG_OF}
        media = {kind: names for kind, names in media.items() if names}
        used = {annotation}
        if not has_turns(fields):
            if caption:
                fields["caption"] = self._text(caption, members)
                used.add(caption)
            elif not annotation:
                raise BadSampleError(BAD_RECORD, "neither a .json nor a .txt member; add the annotation")
            fields = media | fields
        fields = official(fields)
        if not any(fields.get(kind) for kind in TAG_OF):
            fields |= media
        for kind in TAG_OF:
            if kind in fields:
                fields[kind] = [self._embedded(entry, members, used) for entry in fields[kind]]
        unused = [name for name in members if name not in used]
        lost = next((name for name in unused if kind_of(name) or name.lower().endswith(_DOCUMENTS)), None)
        if lost:
            raise BadSampleError(TAGS, f"nothing reads {lost}; name it in the annotation, or remove it from the tar")
        return fields | {f"member *{os.path.splitext(name)[1]}": True for name in unused}

    def _embedded(self, entry: Any, members: Mapping[str, _Place], used: set[str | None]) -> Any:
        """Returns a medium with its content; adds its member to those in use."""
        if isinstance(entry, list | tuple):
            return [self._embedded(item, members, used) for item in entry]
        options = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
        name = options.get("path")
        if options.get("bytes") is not None or not name:
            return entry
        member = next((member for member in members if member == name or os.path.basename(member) == name), None)
        if member is None:
            reason = f"{name} is not in the tar among the members of its sample"
            raise BadSampleError(MISSING, reason, f"{self.path}/{name}")
        used.add(member)
        return {**options, "bytes": self._content(member, members)}

    def _text(self, name: str, members: Mapping[str, _Place]) -> str:
        try:
            return self._content(name, members).decode()
        except UnicodeDecodeError:
            raise BadSampleError(NOT_UTF8, f"{name} is not UTF-8") from None

    def _content(self, name: str, members: Mapping[str, _Place]) -> bytes:
        start, length = members[name]
        content = self._file.read(start, start + length)
        if len(content) < length:
            raise BadSampleError(BAD_RECORD, f"{name} is cut off; download the tar again")
        return content


def _find(members: Mapping[str, _Place], ending: str) -> str | None:
    return next((name for name in members if name.lower().endswith(ending)), None)


def _grouped(members: Sequence[tuple[str, _Place]]) -> dict[str, dict[str, _Place]]:
    """Returns the members of each sample by the key of the sample, in the order of the tar."""
    groups: dict[str, list[tuple[str, _Place]]] = {}
    for name, place in members:
        folder, base = os.path.split(name)
        if not base.startswith(_LITTER):
            groups.setdefault(os.path.join(folder, base.split(".", 1)[0] or base), []).append((name, place))
    samples: dict[str, dict[str, _Place]] = {}
    for key, group in groups.items():
        endings = Counter(os.path.splitext(name)[1].lower() for name in dict(group))
        split = endings[_ANNOTATION] > 1 or endings[_CAPTION] > 1
        for name, place in group:
            sample = samples.setdefault(os.path.splitext(name)[0] if split else key, {})
            sample[name] = f"{name} is twice in the tar; keep one of them" if name in sample else place
    return samples


def _scan(path: str, file: ByteFile) -> tuple[list[tuple[str, _Place]], list[tuple[str, dict[str, _Place]]]]:
    """Lists a tar.

    Returns:
      Names and places of the members in order; a sample without any content for each stretch that is no tar.

    Raises:
      InputError: There is no member.
    """
    import fsspec

    members: list[tuple[str, _Place]] = []
    end, gaps = 0, []
    try:
        with fsspec.open(path, "rb") as opened, tarfile.open(fileobj=opened, mode="r:", ignore_zeros=True) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # otherwise TarFile keeps every header in memory
                gaps.append((end, member.offset))
                if member.size < 0:
                    break
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isreg() and not member.issparse():
                    members.append((member.name, (member.offset_data, member.size)))
                elif not member.isdir():
                    members.append((member.name, f"{member.name} is a link or no ordinary file, which is not read"))
    except Exception as error:  # damage may raise anything
        if not members:
            raise InputError(f"{path}: not a readable tar file ({one_line(error)}); download it again") from None
    if not members:
        raise InputError(f"{path}: not a readable tar file; download it again")
    gaps.append((end, file.size))
    damaged = [gap for gap in gaps if not _is_padding(file, *gap)]
    fault = "no tar from byte {} to byte {}, so samples may be missing; download it again"
    return members, [(f"at byte {start}", {"": fault.format(start, stop)}) for start, stop in damaged]


def _is_padding(file: ByteFile, start: int, stop: int) -> bool:
    """Returns whether a stretch between members is as it should be: zeros and global headers."""
    while start < stop:
        content = file.read(start, min(start + _CHUNK, stop))
        if not content:
            return True
        if any(content):
            try:
                header = tarfile.TarInfo.frombuf(content[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return False
            if header.type != tarfile.XGLTYPE or header.size < 0:
                return False
            start += tarfile.BLOCKSIZE + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        else:
            start += len(content)
    return True
