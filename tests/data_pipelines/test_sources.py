"""Tests that sources of every kind return their records in any order and after pickling, and locate bad records."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import sample_errors
from data_pipelines.layouts import official
from data_pipelines.sample_errors import SampleError
from data_pipelines.sources import Record, array_records, open_source
from vl3_jax.errors import InputError
from vl3_jax.storage.file_digests import FileDigests

RECORDS = [
    {"conversations": [{"from": "human", "value": f'Q{n} "é]{{ \\ 漢'}, {"from": "gpt", "value": "A" * n}], "id": n}
    for n in range(20)
]


def fields(source):
    return [source[index].fields for index in range(len(source))]


def write_lines(path, lines):
    path.write_bytes(b"\n".join(lines))
    return str(path)


def as_json(record):
    return json.dumps(record, ensure_ascii=False).encode()


def test_lines(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [b"", *map(as_json, RECORDS), b"  ", b""])
    source = open_source(path)
    assert fields(source) == RECORDS
    assert source[3].where == f"{path}, line 5"
    unpickled = pickle.loads(pickle.dumps(source))
    assert fields(unpickled) == RECORDS
    assert unpickled.fingerprint(FileDigests()) == source.fingerprint(FileDigests())


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_one_list(tmp_path, indent, bom):
    path = tmp_path / "a.json"
    text = json.dumps(RECORDS, ensure_ascii=False, indent=indent)
    path.write_bytes(bom + b"\n " + text.encode())
    source = open_source(str(path))
    assert fields(source) == RECORDS
    lines = text.splitlines()
    expected = 2 if indent is None else 2 + [i for i, line in enumerate(lines) if line == "  {"][3]
    assert source[3].where == f"{path}, line {expected}"


@given(
    st.lists(st.recursive(st.none() | st.text() | st.integers(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)))
)
def test_any_list_is_split_at_its_own_commas(tmp_path_factory, values):
    values = [{"v": value} for value in [0, *values]]
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    source = open_source(str(path))
    assert [source[index].fields for index in range(len(values))] == values
    lines = path.with_suffix(".jsonl")
    lines.write_bytes(b"".join(as_json(value) + b"\r\n" for value in values))
    assert fields(open_source(str(lines))) == values


def test_bad_lines_are_errors_and_the_other_lines_are_read(tmp_path):
    lines = [as_json(RECORDS[0]), b"{", b'{"caf\xe9": 1}', as_json(RECORDS[1]), b'{"cut": "off']
    path = write_lines(tmp_path / "a.jsonl", lines)
    records = [open_source(path)[index] for index in range(5)]
    assert [type(record) for record in records] == [Record, SampleError, SampleError, Record, SampleError]
    assert [record.where for record in records] == [f"{path}, line {n}" for n in range(1, 6)]
    assert [records[i].kind for i in (1, 2, 4)] == [
        sample_errors.NOT_JSON,
        sample_errors.NOT_UTF8,
        sample_errors.NOT_JSON,
    ]
    assert records[1].file == path


def test_a_truncated_list_yields_its_complete_records(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(RECORDS[:3]).encode()[:-40])
    source = open_source(str(path))
    assert [type(source[index]) for index in range(len(source))] == [Record, Record, SampleError]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b""), ("b.jsonl", b"\n\n"), ("c.json", b"[]"), ("d.json", b" [ ] "), ("e.tar", b"\0" * 10_240)],
)
def test_a_file_without_records_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: no"):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize(
    ("joint", "more"),
    [(b"", []), (b"\n", []), (b" ", [Record]), (b"garbage", []), (b"]", [])],
    ids=["joined", "line", "object", "garbage", "bracket"],
)
def test_what_follows_a_list_is_read_or_reported(tmp_path, joint, more):
    first, second = json.dumps(RECORDS[:2]).encode(), json.dumps(RECORDS[2:3]).encode()
    content = first + joint + (as_json(RECORDS[2]) if more else second)
    (tmp_path / "a.json").write_bytes(content)
    source = open_source(str(tmp_path / "a.json"))
    records = [source[index] for index in range(len(source))]
    if joint.strip():
        assert [type(record) for record in records] == [Record, Record, SampleError]
    else:
        assert [record.fields for record in records] == RECORDS[:3]


@pytest.mark.parametrize("end", [b"", b","])
def test_a_list_that_is_cut_off_between_records_is_reported(tmp_path, end):
    (tmp_path / "a.json").write_bytes(json.dumps(RECORDS[:2]).encode()[:-1] + end)
    source = open_source(str(tmp_path / "a.json"))
    records = [source[index] for index in range(len(source))]
    assert [type(record) for record in records] == [Record, Record, SampleError]
    assert "cut off" in records[2].message


def test_several_files_and_patterns(tmp_path):
    for number in range(3):
        write_lines(tmp_path / f"part{number}.jsonl", map(as_json, RECORDS[number * 5 : number * 5 + 5]))
    source = open_source(str(tmp_path / "part*.jsonl"))
    assert fields(source) == RECORDS[:15]
    assert source[7].where.endswith("part1.jsonl, line 3")


@pytest.mark.parametrize("path", ["none.jsonl", "none*.jsonl", "none", "none.tar"])
def test_a_missing_file_is_named(tmp_path, path):
    with pytest.raises(InputError, match=r"none.*: no"):
        open_source(str(tmp_path / path))
    with pytest.raises(InputError, match="unknown kind 'x'"):
        open_source(str(tmp_path), "x")


def test_remote_lines():
    import fsspec

    with fsspec.open("memory://bucket/a.jsonl", "wb") as file:
        file.write(b"\n".join(map(as_json, RECORDS)))
    source = open_source("memory://bucket/a.jsonl")
    assert fields(pickle.loads(pickle.dumps(source))) == RECORDS


def test_array_record(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    path = str(tmp_path / "a.array_record")
    media = [{"path": "a.png", "bytes": b"\x89PNG"}, {"path": "b.png", "bytes": b"second"}]
    record = {**RECORDS[0], "image": media, "video": [{"path": "c.mp4", "bytes": b"third"}]}
    writer = module.ArrayRecordWriter(path, "group_size:1")
    for content in (array_records.encode(record), array_records.encode(RECORDS[1]), array_records.encode(record)[:-2]):
        writer.write(content)
    writer.close()
    source = pickle.loads(pickle.dumps(open_source(path)))
    assert (source[0].fields, source[1].fields) == (record, RECORDS[1])
    assert source[2].kind == sample_errors.BAD_RECORD
    assert source[1].where == f"{path}, record 2"
    (tmp_path / "b.array_record").write_bytes(b"no shard")
    with pytest.raises(InputError, match=r"b\.array_record"):
        open_source(str(tmp_path / "b.array_record"))


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{**RECORDS[n], "image": [{"bytes": bytes([n]), "path": f"{n}.png"}]} for n in range(20)]
    path = str(tmp_path / "a.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=3)
    source = pickle.loads(pickle.dumps(open_source(path)))
    order = np.random.default_rng(0).permutation(20)
    assert [source[int(n)].fields for n in order] == [rows[n] for n in order]
    assert source[4].where == f"{path}, row 5"


TFDS_WRITER = """
import sys, numpy as np
import tensorflow_datasets as tfds
class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Sequence(tfds.features.Image(encoding_format="png")),
            "conversations": tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()})}))
    def _split_generators(self, manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for n in range(6):
            turns = [{"from": "human", "value": f"Q{n}"}, {"from": "gpt", "value": "é"}]
            yield n, {"image": [sys.argv[2]] * (n % 3), "conversations": turns}
Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


def test_tfds_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from PIL import Image

    Image.new("RGB", (8, 4), "red").save(tmp_path / "red.png")
    subprocess.run(
        [sys.executable, "-c", TFDS_WRITER, str(tmp_path), str(tmp_path / "red.png")], check=True, capture_output=True
    )
    folder = tmp_path / "tiny" / "1.0.0"
    source = pickle.loads(pickle.dumps(open_source(str(folder))))
    assert len(source) == 6
    records = [official(source[index].fields) for index in range(6)]
    records = {record["conversations"][0]["value"]: record for record in records}
    assert set(records) == {f"Q{n}" for n in range(6)}
    assert records["Q4"]["conversations"][1] == {"from": "gpt", "value": "é"}
    assert [len(records[f"Q{n}"].get("image", [])) for n in range(6)] == [0, 1, 2, 0, 1, 2]
    np.testing.assert_array_equal(records["Q1"]["image"][0], np.full((4, 8, 3), [255, 0, 0]))
    assert len(open_source(f"{folder}:train[:50%]")) == 3
    with pytest.raises(InputError, match="split 'test'"):
        open_source(f"{folder}:test")
    assert "tensorflow" not in sys.modules


def error_messages(source):
    return [source[index].message for index in range(len(source)) if isinstance(source[index], SampleError)]


def test_a_table_with_damage_and_with_unread_content(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist(RECORDS), path, row_group_size=5, compression="none")
    content = bytearray(path.read_bytes())
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    source = open_source(str(path))
    assert [isinstance(source[n], Record) for n in range(20)] == [n // 5 != 1 for n in range(20)]
    assert all("row group 2 is damaged" in message for message in error_messages(source))
    parquet.write_table(arrow.table({"a": [1], "b": [2]}).rename_columns(["a", "a"]), path)
    with pytest.raises(InputError, match="two columns are named 'a'"):
        open_source(str(path))
