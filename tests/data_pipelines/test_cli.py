"""Tests `vl3 data` on a small data set with known bad samples, and the mixtures of the stages."""

import json

import numpy as np
import pytest
from PIL import Image
from sample_datasets import TOKENIZER, bad_records, good_records, turns, write_lines

from data_pipelines import mixtures
from data_pipelines.sources import open_source
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError

SMALL = ["length=512", "patches=1024", "max_tokens=128", "min_tokens=4", "max_frames=6", "samples=8", "image_merge=2"]
SET = [word for change in SMALL for word in ("--set", change)]


@pytest.fixture(scope="module")
def folder(folder):
    write_lines(folder / "good.jsonl", good_records(20))
    write_lines(folder / "mixed.jsonl", [*good_records(20), *bad_records(folder)])
    return folder


@pytest.fixture
def data(folder, capfd):
    """Returns a function that runs a subcommand on a file and returns exit code, stdout and stderr."""

    def call(command, file, *flags):
        argv = ["data", command, "--annotations", str(folder / file), "--media", str(folder), "--workers", "0", *flags]
        if command not in ("check", "write"):
            argv += ["--tokenizer", str(TOKENIZER), *SET]
        code = main(argv)
        return code, *capfd.readouterr()

    return call


def test_check(data, folder, tmp_path):
    assert data("check", "good.jsonl")[1].splitlines() == [
        "20 samples read, with 12 images and 12 videos",
        "turns learned: assistant 24; shown: user 20",
        "no problems in 20 samples",
    ]
    report = tmp_path / "report.jsonl"
    code, out, _ = data("check", "mixed.jsonl", "--report", str(report))
    assert code == 1
    assert out.splitlines()[2] == "10 of 30 samples are bad (33.3%)"
    assert f"{folder}/mixed.jsonl, line 24" in out
    errors = [json.loads(line) for line in report.read_text().splitlines()]
    assert [error["where"].split("line ")[1] for error in errors] == [str(n) for n in range(21, 31)]
    quick = data("check", "mixed.jsonl", "--quick")[1]
    assert quick.splitlines()[2].startswith("9 of 30")  # a truncated image is detected only when it is decoded
    in_workers = data("check", "mixed.jsonl", "--workers", "2")[1]
    assert in_workers == out


def test_check_lists_a_time_window_of_single_frames(data, folder):
    """It applies to videos only; training skips the sample as well."""
    fields = {"video": [["p0.png", "p1.png"]], "conversations": turns("Q", "A")}
    write_lines(folder / "frames.jsonl", [fields, {**fields, "start_time": 1.0}])
    code, out, _ = data("check", "frames.jsonl")
    assert (code, out.splitlines()[2]) == (1, "1 of 2 samples are bad (50.0%)")
    assert "start does not apply to frames already chosen" in out
    assert "1 bad" in data("index", "frames.jsonl")[1]


def test_index_stats_and_show(data, tmp_path):
    code, _, err = data("stats", "mixed.jsonl")
    assert code == 2
    assert "run `vl3 data index`" in err
    code, out, err = data("index", "mixed.jsonl")
    assert (code, "30 samples, 9 bad" in out, "9 of 30" in err) == (0, True, True)
    code, out, _ = data("stats", "mixed.jsonl", "--suggest-budgets")
    assert code == 0
    assert "an epoch: 21 samples in" in out
    assert "TFLOP/sample" in out
    assert data("index", "mixed.jsonl", "--kept")[0] == 0
    stats = json.loads(data("stats", "mixed.jsonl", "--json", "--measure", "2")[1])
    (dataset,) = stats["datasets"]
    assert 0 < dataset["kept"] <= 1
    assert stats["speed"]["samples_per_second"] > 0
    path = tmp_path / "row.png"
    code, out, _ = data("show", "mixed.jsonl", "--row", "1", "--out", str(path))
    assert (code, "supervised" in out) == (0, True)
    assert np.asarray(Image.open(path)).std() > 10
    assert data("show", "mixed.jsonl", "--row", "999")[0] == 2


def test_written_shards_hold_the_records_and_their_media(data, folder, tmp_path):
    pytest.importorskip("array_record")
    write = ("write", "mixed.jsonl", "--out", str(tmp_path), "--samples-per-shard", "8")
    code, out, err = data(*write)
    assert (code, "4 shards" in out, "missing file" in err) == (0, True, True)
    source = open_source(str(tmp_path / "data.array_record-*"))
    assert len(source) == 30 - 5  # media that cannot be decoded are copied unchanged
    original = open_source(str(folder / "good.jsonl"))
    for number in range(len(original)):
        before, after = original[number].fields, source[number].fields
        turns = "conversation" if before.get("stream") else "conversations"
        assert after[turns] == before[turns]
        for kind in ("image", "video"):
            names = before.get(kind) or []
            names = [names] if isinstance(names, str) else names
            assert [medium["path"] for medium in after.get(kind) or []] == names
            assert [medium["bytes"] for medium in after.get(kind) or []] == [(folder / n).read_bytes() for n in names]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    next(iter(before)).unlink()
    assert data(*write)[0] == 0
    kept = [path for path in tmp_path.iterdir() if before.get(path) == path.stat().st_mtime_ns]
    assert len(kept) == 3


def test_all_missing_data_sets_are_listed_at_once(capsys, tmp_path):
    argv = ["data", "check", "--config", "data/stage4", "--set", f"root={tmp_path}"]
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert "27 of 27 data sets are missing" in message
    assert f"{tmp_path}/COIN/annotations.jsonl" in message
    (tmp_path / "COIN").mkdir()
    write_lines(tmp_path / "COIN" / "annotations.jsonl", [{"conversations": []}])
    assert main([*argv, "--skip-missing", "--workers", "0"]) == 1
    captured = capsys.readouterr()
    assert "1 of 1 samples are bad" in captured.out
    assert captured.err.count("left out") == 26


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --config or --annotations"),
        (["--config", "none.py"], "none.py: no such configuration"),
        (["--config", "data/stage1", "--set", "x"], "key=value"),
        (["--config", "data/stage1", "--set", "lenth=3"], "'lenth' is unknown"),
        (["--config", "data/stage1", "--set", "length=long"], "give a value like 16384"),
        (["--annotations", "none.jsonl"], "none.jsonl"),
        (["--annotations", "none.jsonl", "--skip-missing"], "all data sets are missing"),
    ],
)
def test_bad_flags(capsys, flags, message):
    assert main(["data", "check", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "amount", "count", "patches", "image_merge", "pruned"),
    [
        (1, 15.57, 7, 16384, 1, False),
        (2, 27.22, 34, 16384, 1, False),
        (3, 19.05, 39, 40960, 1, True),
        (4, 5.72, 27, 40960, 2, True),
    ],
)
def test_stage_mixtures(stage, amount, count, patches, image_merge, pruned):
    path = f"data/stage{stage}"
    config = mixtures.load(path, ["root=/d"])
    assert round(sum(config.amounts.values()) / 1e6, 2) == amount
    specs, settings = mixtures.dataset_specs(config), mixtures.data_settings(config)
    assert len(specs) == count
    assert (settings.shape.length, settings.shape.patches) == (16384, patches)
    assert settings.processor.max_tokens == 10240
    assert (settings.processor.image_merge, settings.processor.video_merge) == (image_merge, 2)
    assert (settings.processor.prune_threshold is not None) == pruned
    name = specs[0].name
    assert specs[0].annotations == (f"/d/{name}/annotations.jsonl",)
    other = mixtures.load(path, [f"datasets.{name}.weight=2", f"datasets.{name}.annotations=/x/a.tar", "root=gs://b"])
    assert mixtures.dataset_specs(other)[0].weight == 2.0
    assert mixtures.dataset_specs(other)[0].annotations == ("/x/a.tar",)
    assert mixtures.dataset_specs(other)[1].media.startswith("gs://b/")
    assert len(mixtures.dataset_specs(mixtures.load(path, [f"datasets.{name}.weight=0"]))) == count - 1


def test_a_mixture_names_each_data_set_once():
    group = mixtures.Group("a", 1, ["x", "x"])
    with pytest.raises(InputError, match="x: twice"):
        mixtures.mixture([group])
