"""`vl3 bench`, whole and in tiny sizes."""

import json
import sys

import pytest
from PIL import Image

from vl3_jax.bench import GROUPS, SUBJECTS
from vl3_jax.bench.table import OURS
from vl3_jax.cli.main import main

ROW = {"case", "side", "seconds", "rate", "unit", "times_ours", "flops", "share_of_peak", "figures"}


def test_everything_runs_in_tiny_sizes(tmp_path, capsys):
    assert main(["bench", "--small", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "the figures mean nothing" in printed
    found = json.loads((tmp_path / "bench.json").read_text())
    assert (found["subjects"], found["model"], found["dtype"]) == (list(SUBJECTS), "tiny", "float32")
    assert found["machine"]["platform"] == "cpu"
    assert found["machine"]["versions"]["jax"]
    assert found["peak_flops"] > 1e9
    assert found["copy_bytes_per_second"] > 1e6
    assert [table["name"] for table in found["tables"]] == list(SUBJECTS)
    for table in found["tables"]:
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
    step = next(table for table in found["tables"] if table["name"] == "step")
    assert "miniature" in step["notes"][0]


def test_a_group_is_its_subjects_in_order(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("vl3_jax.bench.measure", lambda name, settings: asked.append(name) or _nothing(name))
    assert main(["bench", "loss", "gpu", "loss", "--small", "--out", str(tmp_path / "new" / "folder")]) == 0
    assert asked == ["loss", *GROUPS["gpu"]]
    assert (tmp_path / "new" / "folder" / "loss.png").exists()


def _nothing(name):
    from vl3_jax.bench.table import Row, Table

    return Table(name, "nothing", [Row("case", OURS, 1.0, 1, "things")])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["towel"], "no subject 'towel'; there are packing, tower, "),
        (["loss", "--model", "3b"], "--model 3b: give one of 2b, 7b, "),
        (["loss", "--rounds", "0"], "--rounds 0: give 1 or more"),
        (["loss", "--out", "{file}"], "--out {file}: cannot be made"),
    ],
)
def test_mistakes_are_one_line(flags, complaint, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["bench", *(flag.format(file=file) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vl3 bench: {complaint.format(file=file)}")
    assert error.count("\n") == 1


def test_without_the_library_that_draws(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "loss", "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == "vl3 bench: pictures need matplotlib: pip install 'vl3_jax[bench]'\n"
    assert not (tmp_path / "new").exists()
