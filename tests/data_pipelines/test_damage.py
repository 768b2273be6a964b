"""Tests that damaged records, tars, tables and shards end in samples and named problems: no traceback, no hang."""

import copy
import functools
import json
import pathlib
import random
import tempfile

import pytest
from sample_datasets import good_records, write_media, write_tar

from data_pipelines.inspection.checking import check
from data_pipelines.layouts import official
from data_pipelines.media_signs import media_names
from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.sample_errors import FAILED, SampleErrorLog, to_json_lines
from data_pipelines.sources import array_records
from support.bounded import run_bounded
from vl3_jax.processing.processor_config import ProcessorConfig

NAMES = ("a.jsonl", "b.json", "c.tar", "d.parquet", "e.array_record")
NUMBERS = (0, -1, 1e308, -1e308, float("nan"), float("inf"), 10**400, -(10**400))
TEXTS = ("", " ", "<image>", "\ud83d", "x" * 100_000, "a\0b", "../a.png", "p0.png", "v0.mp4", "gpt", "human")
URLS = ("http://[", "memory://none/a.png", "data:image/png;base64,!", "file:///none")
OBJECTS = ([], {}, [[]], [None], [{}], [""], {"path": None}, {"bytes": ""}, {"url": "data:,"}, [[[["p0.png"]]]])
DEEP = functools.reduce(lambda inner, _: [inner], range(200), 0)
HOSTILE = (None, True, False, *NUMBERS, *TEXTS, *URLS, *OBJECTS, DEEP)
BYTES = (*(bytes([byte]) for byte in b'\0\xff"{}[],\n\\'), b"\xff\xff\xff\x7f", b"\x80\0\0\0\0\0\0\0", b"9" * 5000)
KEYS = ("image", "video", "images", "videos", "stream", "system", "loss", "x")
IMAGE_PART = {"type": "image_url", "image_url": {"url": "p1.png"}}
RECORDS = [
    *good_records(10, images=2),
    {"messages": [{"role": "user", "content": [IMAGE_PART, "Q"]}, {"role": "assistant", "content": "A", "weight": 1}]},
    {"images": ["p0.png"], "texts": [{"user": "Q", "assistant": "A"}]},
    {"video": [["p0.png", "p1.png"]], "timestamps": [0, 1], **good_records(1)[0]},
]


def tar_of(folder: pathlib.Path, path: pathlib.Path, given: list[dict]) -> None:
    """Writes a tar of records, with the media that those of `RECORDS` name."""
    members: dict[str, bytes] = {}
    for number, (record, original) in enumerate(zip(given, RECORDS, strict=True)):
        names = sorted(media_names(official(original)))
        text = json.dumps(record)
        for name in names:
            text = text.replace(f'"{name}"', f'"{number}.{name}"')
        members[f"{number}.json"] = text.encode()
        members |= {f"{number}.{name}": (folder / name).read_bytes() for name in names}
    write_tar(path, members.items())


def write_base(folder: pathlib.Path) -> None:
    """Writes one good file of each kind."""
    write_media(folder, images=2, videos=3)
    (folder / NAMES[0]).write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (folder / NAMES[1]).write_text(json.dumps(RECORDS))
    tar_of(folder, folder / NAMES[2], RECORDS)
    embedded = [{"path": "p0.png", "bytes": (folder / "p0.png").read_bytes()}]
    rows = [{"conversations": record["conversations"], "image": embedded} for record in map(official, RECORDS[:4])]
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), folder / NAMES[3], row_group_size=3)
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(folder / NAMES[4]), "group_size:1")
    for row in rows:
        writer.write(array_records.encode(row))
    writer.close()
    for name in NAMES:
        seen, counts, _ = check(DatasetSpec("a", (str(folder / name),), str(folder)), ProcessorConfig(threads=1))
        assert seen == counts.samples


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Returns a file with a few stretches changed, removed, doubled, or its end cut off."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(content) + 1)
        if rng.random() < 0.5:  # headers and footers are short, but matter most
            start = rng.choice((rng.randrange(min(len(content), 600) + 1), max(len(content) - rng.randrange(600), 0)))
        stop = min(start + rng.choice((1, 1, 4, 8, 64, 512, 4096)), len(content))
        piece = content[start:stop]
        filler = rng.choice((rng.randbytes(len(piece)), bytes(len(piece)), rng.choice(BYTES)))
        same_length = (filler * len(piece))[: len(piece)]
        new = rng.choice((same_length, same_length, b"", piece * 2, filler))
        content = content[:start] + new + content[stop:]
    return content[: rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content


def mutated_record(record: dict, rng: random.Random) -> dict:
    """Returns a record in which one or two values or keys are others."""
    record = copy.deepcopy(record)
    for _ in range(rng.choice((1, 2))):
        holders = [record]
        for holder in holders:
            values = list(holder.values()) if isinstance(holder, dict) else holder
            holders += [value for value in values if isinstance(value, dict | list) and value]
        holder = rng.choice(holders[:200])
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if isinstance(holder, dict) and rng.random() < 0.3:
            holder[rng.choice(KEYS)] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    return record


def write_mutated(path: pathlib.Path, folder: pathlib.Path, seed: int) -> None:
    """Writes a damaged file: of lines and tars, mostly one with other values in its records."""
    rng = random.Random(f"{path.name} {seed}")
    changed = [mutated_record(record, rng) for record in RECORDS]
    if path.name == "a.jsonl" and seed % 3:
        path.write_text("\n".join(map(json.dumps, changed)))
    elif path.name == "c.tar" and seed % 3:
        tar_of(folder, path, changed)
    else:
        path.write_bytes(mutated_bytes((folder / path.name).read_bytes(), rng))


def check_mutated(folder: str, item: tuple[str, int]) -> list[str]:
    """Checks a damaged file; returns the problems that have no name."""
    name, seed = item
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch, name)
        write_mutated(path, pathlib.Path(folder), seed)
        seen, counts, errors = check(DatasetSpec("a", (str(path),), folder), ProcessorConfig(threads=1, max_frames=4))
    assert counts.samples + len(errors) == seen
    log = SampleErrorLog()
    log.add(errors, seen)
    report = (to_json_lines(errors) + log.table() + "\n".join(counts.lines())).encode()
    assert len(report) < 10_000 + 1500 * seen
    return [str(error) for error in errors if error.kind == FAILED]


@pytest.mark.parametrize("count", [pytest.param(60, id="60"), pytest.param(1000, id="1000", marks=pytest.mark.slow)])
def test_mutations_of_every_kind_of_file(tmp_path, count):
    write_base(tmp_path)
    items = [(name, seed) for seed in range(count) for name in NAMES]
    outcomes = run_bounded(functools.partial(check_mutated, str(tmp_path)), items)
    assert [str(outcome) for outcome in outcomes if not outcome.harmless] == []
    unnamed = {line for outcome in outcomes if outcome.kind == "result" for line in outcome.value}
    assert unnamed == set()
    assert sum(outcome.kind == "result" for outcome in outcomes) > count
