"""Tests the `vl3 bench` command in tiny sizes."""

import importlib.util
import json
import sys

import pytest
from PIL import Image

from support.media import MEDIA
from vl3_jax.bench import SUBJECTS, inputs
from vl3_jax.bench.table import OURS, REFERENCE
from vl3_jax.cli.main import main

WITH_REFERENCE = {"tower", "prefill", "step", "decode", "processor", "pruning", "loader"}
ROW = {"case", "side", "seconds", "rate", "unit", "times_ours", "flops", "share_of_peak", "figures"}


@pytest.mark.slow
def test_all_subjects_run_in_tiny_sizes(tmp_path, capsys):
    assert main(["bench", "--small", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "the figures mean nothing" in printed
    results = json.loads((tmp_path / "bench.json").read_text())
    assert (results["subjects"], results["model"], results["dtype"]) == (list(SUBJECTS), "tiny", "float32")
    assert results["machine"]["platform"] == "cpu"
    assert results["machine"]["versions"]["jax"]
    assert results["peak_flops"] > 1e9
    assert results["copy_bytes_per_second"] > 1e6
    assert [table["name"] for table in results["tables"]] == list(SUBJECTS)
    for table in results["tables"]:
        assert f"{table['name']}: {table['title']}" in printed
        assert Image.open(tmp_path / f"{table['name']}.png").width > 300
        cases = {row["case"] for row in table["rows"]}
        for row in table["rows"]:
            assert set(row) == ROW
            assert row["seconds"] > 0
            assert row["rate"] > 0
            assert (row["share_of_peak"] is None) == (row["flops"] is None)
        ours = [row for row in table["rows"] if row["side"] == OURS]
        assert sorted(row["case"] for row in ours) == sorted(cases)
        assert all(row["times_ours"] == 1 for row in ours)
        assert len(table["rows"]) > len(ours)
    step = next(table for table in results["tables"] if table["name"] == "step")
    assert "reduced sizes" in step["notes"][0]
    if importlib.util.find_spec("torch"):
        names = {table["name"] for table in results["tables"] if REFERENCE in {row["side"] for row in table["rows"]}}
        assert names == WITH_REFERENCE


def test_outside_a_checkout_a_note_says_why_transformers_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "_REFERENCE_FILE", tmp_path / "reference.py")
    inputs._reference_module.cache_clear()
    assert main(["bench", "pruning", "--small", "--out", str(tmp_path)]) == 0
    note = "without transformers: the comparison is part of the tests; run the command in a checkout of the project"
    assert capsys.readouterr().out.count(f"\n  {note}\n") == 1
    (table,) = json.loads((tmp_path / "bench.json").read_text())["tables"]
    assert table["notes"] == [note]
    assert REFERENCE not in {row["side"] for row in table["rows"]}


def test_given_media_and_long_measurements(tmp_path):
    """Of three files, the reader refuses the text; an hour is a minute here."""
    media = [MEDIA / "images" / "handwriting.png", MEDIA / "videos" / "tree.avi"]
    text = tmp_path / "text.png"
    text.write_text("no image")
    flags = ["--small", "--long", "--out", str(tmp_path), "--media"]
    assert main(["bench", "processor", *flags, *map(str, [*media, text])]) == 0
    (table,) = json.loads((tmp_path / "bench.json").read_text())["tables"]
    ours = {row["case"]: row for row in table["rows"] if row["side"] == OURS}
    assert list(ours) == [*(path.name for path in media), "video of 60 s, 96 x 64"]
    assert ours["video of 60 s, 96 x 64"]["figures"]["peak MB"] < ours["video of 60 s, 96 x 64"]["figures"]["target MB"]
    assert {row["case"] for row in table["rows"] if row["side"] == "official preprocessing"} == {m.name for m in media}
    assert any(note.startswith("vl3_jax cannot read text.png: ") for note in table["notes"])

    assert main(["bench", "loader", *flags, *map(str, media)]) == 0
    (table,) = json.loads((tmp_path / "bench.json").read_text())["tables"]
    tokens = {row["side"]: row["figures"].get("vision tokens/s") for row in table["rows"][:-1]}
    assert min(tokens.values()) > 0
    figures = next(row["figures"] for row in table["rows"] if row["side"] == "one thread")
    assert sum(value for name, value in figures.items() if name.endswith(" %")) == pytest.approx(100)
    assert table["rows"][-1]["case"] == "20 samples"
    assert len(table["rows"][-1]["figures"]) == 10


def test_subjects_are_measured_once_in_the_order_given(tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr("vl3_jax.bench.measure", lambda name, settings: measured.append(name) or _empty_table(name))
    assert main(["bench", "loss", "decode", "loss", "--small", "--out", str(tmp_path / "new" / "folder")]) == 0
    assert measured == ["loss", "decode"]
    assert (tmp_path / "new" / "folder" / "loss.png").exists()


def _empty_table(name):
    from vl3_jax.bench.table import Row, Table

    return Table(name, "nothing", [Row("case", OURS, 1.0, 1, "things")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["towel"], "no subject 'towel'; there are packing, tower, "),
        (["loss", "--model", "3b"], "--model 3b: give one of 2b, 7b, "),
        (["loss", "--out", "{file}"], "--out {file}: cannot be created"),
        (["loader", "--media", "{file}", "{file}.mp4"], "--media {file}.mp4: no such file"),
    ],
)
def test_bad_input_is_reported_in_one_line(flags, message, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["bench", *(flag.format(file=file) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vl3 bench: {message.format(file=file)}")
    assert error.count("\n") == 1


def test_matplotlib_is_required(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "loss", "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == "vl3 bench: charts need matplotlib: pip install 'vl3_jax[bench]'\n"
    assert not (tmp_path / "new").exists()
