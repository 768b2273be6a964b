"""Tests the script `vl3 bench gpu` in miniature."""

import json
import math
import multiprocessing
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from vl3_jax.bench.gpu import PARTS, Part, script
from vl3_jax.bench.gpu.cases import Case, UnavailableError
from vl3_jax.bench.gpu.process import measure
from vl3_jax.cli.main import main
from vl3_jax.processing.packed_batch import BatchShape, pack

# Parts that need no jax. The processes find the module through `sys.path`.
PARTS_MODULE = """
import time
from vl3_jax.bench.gpu import process
from vl3_jax.bench.gpu.cases import Case

process._machine = lambda: {"platform": "none"}

def quick(conditions):
    yield Case({"what": "quick"}, lambda figures: figures.update(seconds=1.0))

def hangs(conditions):
    yield from quick(conditions)
    yield Case({"what": "hangs"}, lambda figures: time.sleep(600))

def raises(conditions):
    yield from quick(conditions)
    raise RuntimeError("several\\nlines")
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of all runs, whose compiled programs they share."""
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture
def set_parts(tmp_path, monkeypatch):
    """Returns a function that replaces parts by functions of `PARTS_MODULE`."""
    (tmp_path / "parts_without_jax.py").write_text(PARTS_MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def replace(**functions):
        for name, function in functions.items():
            monkeypatch.setitem(PARTS, name, Part(function, f"parts_without_jax:{function}", 1.0))

    return replace


def read(folder: pathlib.Path) -> dict:
    return json.loads((folder / "gpu.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.slow
def test_all_parts_measure_in_miniature(out, capsys):
    assert main(["bench", "gpu", "--small", "--out", str(out)]) == 0
    printed, results = capsys.readouterr().out, read(out)
    assert "the figures mean nothing" in printed
    assert results["machine"]["platform"] == "cpu"
    assert 0 < results["seconds"] < 60 * results["minutes"]
    assert list(results["parts"]) == list(PARTS) == ["peaks", "step", "attention", "decode"]
    counts = {"peaks": 2, "step": 2, "attention": 12, "decode": 2}
    for name, part in results["parts"].items():
        assert "error" not in part
        assert part["seconds"] > 0
        measurements = part["measurements"]
        assert len(measurements) == counts[name]
        assert printed.count(f"\n{name} ") + printed.startswith(f"{name} ") == counts[name]
        for measurement in measurements:
            assert "error" not in measurement
            numbers = [value for value in measurement.values() if not isinstance(value, str)]
            assert numbers or measurement["note"]
            assert all(0 < number < math.inf for number in numbers)
    attention, step = (results["parts"][name]["measurements"] for name in ("attention", "step"))
    assert {row["side"] for row in attention} == {"vl3_jax", "cuDNN", "torch"}
    assert all(row["deviation"] < 0.02 for row in attention if "note" not in row)
    assert {row["note"] for row in attention if row["side"] == "cuDNN"} == {"cuDNN needs a GPU"}
    assert all("mfu_of_matrix_product" in row and "mfu" not in row for row in step)
    assert len({row["flops"] for row in step}) == 1
    assert all("of_copy" in row for row in results["parts"]["decode"]["measurements"])


@pytest.mark.slow
@pytest.mark.parametrize("victim", PARTS)
def test_a_killed_part_leaves_what_was_saved(victim, out, set_parts):
    """The victim is the real part, killed from outside after its first measurement."""
    set_parts(**{name: "quick" for name in PARTS if name != victim})

    def report(line):
        if line.startswith(f"{victim} ") and "failed" not in line:
            for process in multiprocessing.active_children():
                process.kill()

    script.run(out, 8, True, report)
    parts = read(out)["parts"]
    assert list(parts) == list(PARTS)
    assert parts[victim]["error"] == "killed by SIGKILL"
    assert 0 < parts[victim]["measurements"][0]["seconds"] < math.inf
    for name in set(PARTS) - {victim}:
        assert parts[name]["measurements"] == [{"what": "quick", "seconds": 1.0}]
        assert "error" not in parts[name]


def test_a_part_that_raises_or_hangs_does_not_stop_the_others(tmp_path, set_parts):
    set_parts(peaks="raises", step="hangs", attention="quick", decode="quick")
    PARTS["step"] = PARTS["step"]._replace(share=0.05)
    lines = []
    script.run(tmp_path, 1, True, lines.append)
    parts = read(tmp_path)["parts"]
    assert [part.get("error") for part in parts.values()] == [
        "RuntimeError: several lines",
        "stopped after 3 s",
        None,
        None,
    ]
    assert all(part["measurements"] == [{"what": "quick", "seconds": 1.0}] for part in parts.values())
    assert "peaks      failed: RuntimeError: several lines" in lines


def test_parts_after_the_deadline_are_skipped(tmp_path, set_parts, capsys):
    set_parts(peaks="quick", step="hangs", attention="quick", decode="quick")
    assert main(["bench", "gpu", "--small", "--minutes", "0.05", "--out", str(tmp_path)]) == 0
    parts, printed = read(tmp_path)["parts"], capsys.readouterr().out
    assert parts["step"]["error"].startswith("stopped after ")
    for name in ("attention", "decode"):
        assert parts[name]["skipped"] == "the 0.05 minutes were over"
        assert parts[name]["measurements"] == []
        assert f"{name:10} skipped: the 0.05 minutes were over\n" in printed


def test_a_run_that_measures_nothing_fails(tmp_path, capsys):
    assert main(["bench", "gpu", "--small", "--minutes", "1e-9", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("skipped") == len(PARTS)


def test_a_case_keeps_its_figures_when_it_fails():
    def fail(error):
        def run(figures):
            figures["compile_seconds"] = 2.0
            raise error

        return measure(Case({"tokens": 8}, run))

    found = fail(RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile trying to allocate 9 bytes"))
    error = "RuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"
    assert found == {"tokens": 8, "compile_seconds": 2.0, "error": error, "out_of_memory": True}
    assert "out_of_memory" not in fail(ValueError("x"))
    assert fail(UnavailableError("no such side")) == {"tokens": 8, "compile_seconds": 2.0, "note": "no such side"}
    assert measure(Case({}, lambda figures: figures.update(loss=math.nan, seconds=1.0))) == {
        "seconds": 1.0,
        "error": "loss is nan",
    }


def test_rows_are_filled_like_those_of_stage_4():
    from vl3_jax.bench.gpu.step_part import stage4_samples
    from vl3_jax.training.flops import count_work

    samples = stage4_samples(11_304, 39_608, 20)
    batch = pack([samples], BatchShape(12_288, 40_960, 10_240))
    work = count_work(batch)
    assert (work.tokens, work.patches, work.patch_pairs) == (11_304, 39_600, 39_600 * 400)
    assert work.supervised / work.tokens == pytest.approx(0.15, abs=0.001)
    assert work.vision_tokens / work.tokens == pytest.approx(0.8, abs=0.001)
    assert [len(sample.tokens) for sample in samples] == [4810, 4810, 1684]
    again = pack([stage4_samples(11_304, 39_608, 20)], BatchShape(16_384, 40_960, 10_240))
    np.testing.assert_array_equal(again["patches"], batch["patches"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["gpu", "step"], "gpu is a script of its own: give no other name beside it"),
        (["gpu", "--model", "2b"], "--model: is not for gpu"),
        (["gpu", "--rounds", "3"], "--rounds: is not for gpu"),
        (["gpu", "--long"], "--long: is not for gpu"),
        (["gpu", "--out", "{file}"], "--out {file}: cannot be created"),
        (["step", "--minutes", "3"], "--minutes 3: is for gpu only"),
    ],
)
def test_bad_flags_are_reported_in_one_line(flags, message, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["bench", *(flag.format(file=file) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vl3 bench: {message.format(file=file)}")
    assert error.count("\n") == 1


def test_full_sizes_need_a_gpu(tmp_path, capsys):
    assert main(["bench", "gpu", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("vl3 bench: gpu: jax found no GPU; --small runs")
    assert not multiprocessing.active_children()


def test_parts_do_without_packages_that_read_videos_and_configurations():
    """A lent machine often has jax, flax and optax only; the command itself does not even import jax."""
    modules = [part.cases.partition(":")[0] for part in PARTS.values()]
    absent = "{'av', 'cv2', 'grain', 'ml_collections', 'orbax', 'tensorboardX', 'tensorstore', 'matplotlib', 'torch'}"
    code = (
        "import sys, importlib, vl3_jax.cli.main, vl3_jax.cli.bench, vl3_jax.bench.gpu.script\n"
        "assert 'jax' not in sys.modules\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        f"print(sorted({absent} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
