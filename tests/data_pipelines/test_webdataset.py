"""Tests that samples of tars are read whole, and that what is left of a tar, damaged or unused is named."""

import io
import json
import pathlib
import pickle
import tarfile

from sample_datasets import write_tar

from data_pipelines import sample_errors
from data_pipelines.sample_errors import SampleError
from data_pipelines.sources import Record, open_source

RECORDS = [
    {"conversations": [{"from": "human", "value": f"Q{n}"}, {"from": "gpt", "value": "A"}], "id": n} for n in range(8)
]


def as_json(record):
    return json.dumps(record).encode()


def error_messages(source):
    return [source[index].message for index in range(len(source)) if isinstance(source[index], SampleError)]


def test_webdataset(tmp_path):
    named = {**RECORDS[0], "image": ["x.right.png", "x.left.png"]}
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("d/x.json", as_json(named)),
            ("d/x.left.png", b"left"),
            ("d/x.right.png", b"right"),
            ("d/y.jpg", b"image"),
            ("d/y.txt", b" a caption\n"),
            ("d/z.json", b"{"),
            ("d/w.json", as_json({**RECORDS[0], "image": "gone.png"})),
            ("d/v.json", as_json(RECORDS[2])),
            ("d/v.mp4", b"video" * 1000),
        ],
    )
    source = pickle.loads(pickle.dumps(open_source(path)))
    assert [source[i].where.split("sample ")[1] for i in range(5)] == ["d/x", "d/y", "d/z", "d/w", "d/v"]
    assert [medium["bytes"] for medium in source[0].fields["image"]] == [b"right", b"left"]
    assert source[1].fields["conversations"][1]["value"] == "a caption"
    assert source[1].fields["image"] == [{"path": "d/y.jpg", "bytes": b"image"}]
    assert [source[2].kind, source[3].kind] == [sample_errors.NOT_JSON, sample_errors.MISSING]
    assert not pathlib.Path(source[3].file).exists()  # otherwise an index would be built again and again
    assert source[4].fields["video"][0]["bytes"] == b"video" * 1000
    doubled = tmp_path / "doubled.tar"
    doubled.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "a.tar").read_bytes())
    assert all("is twice in the tar" in record.message for record in open_source(str(doubled)))
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "a.tar").read_bytes()[: 9 * 1024 + 4096])
    source = open_source(str(cut))
    assert source[len(source) - 1].kind in (sample_errors.BAD_RECORD, sample_errors.NOT_JSON)
    assert isinstance(source[0], Record)


def test_a_tar_names_what_it_does_not_read(tmp_path):
    conversation = as_json(RECORDS[0])
    tags = as_json({"conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]})
    members = [
        *(("a.json", tags), ("a.left.png", b"1"), ("a.cls", b"3"), ("._a.png", b"litter")),
        *(("b.json", as_json({**RECORDS[0], "image": "b.1.png"})), ("b.1.png", b"1"), ("b.2.png", b"2")),
        *(("c.json", conversation), ("c.wav", b"sound")),
        ("d.jpg", b"no annotation"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("e.json"), io.BytesIO())
        link = tarfile.TarInfo("e.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(path)
    assert source[0].fields["member *.cls"]
    assert [
        name in message
        for name, message in zip(["b.2.png", "c.wav", ".txt", "a link"], error_messages(source), strict=True)
    ] == [True] * 4


def test_a_tar_is_read_around_damage(tmp_path):
    members = [(f"{n}.json", as_json(record)) for n, record in enumerate(RECORDS[:6])]
    content = bytearray(pathlib.Path(write_tar(tmp_path / "a.tar", members)).read_bytes())
    content[2 * 1024 : 2 * 1024 + 8] = b"damaged!"  # the header of the third member
    (tmp_path / "b.tar").write_bytes(content)
    source = open_source(str(tmp_path / "b.tar"))
    assert [source[n].fields["id"] for n in range(5)] == [0, 1, 3, 4, 5]
    assert error_messages(source) == [
        "no tar from byte 2048 to byte 3072, so samples may be missing; download it again"
    ]
    other = write_tar(tmp_path / "c.tar", [("x/0.json", as_json(RECORDS[7]))])
    (tmp_path / "d.tar").write_bytes((tmp_path / "a.tar").read_bytes() + pathlib.Path(other).read_bytes())
    source = open_source(str(tmp_path / "d.tar"))
    assert [source[n].fields["id"] for n in range(len(source))] == [0, 1, 2, 3, 4, 5, 7]
    with tarfile.open(tmp_path / "e.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "é" * 600}) as tar:
        tar.add(tmp_path / "a.tar", "x.json")
    assert error_messages(open_source(str(tmp_path / "e.tar"))) != []
    assert "no tar" not in str(error_messages(open_source(str(tmp_path / "e.tar"))))


def test_lengths_that_only_a_header_claims_take_no_memory(tmp_path):
    header = tarfile.TarInfo("a.json")
    header.size = 2**43
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"{}" * 512)
    assert error_messages(open_source(str(tmp_path / "a.tar"))) == ["a.json is cut off; download the tar again"]
