"""`vl3 eval` on a tiny random checkpoint, and the name `nano`."""

import json

import pytest

import vl3_jax as vl3
from support.adapters import write_adapter
from support.checkpoints import write_small_checkpoint
from vl3_jax.checkpoint import opening
from vl3_jax.cli.main import main
from vl3_jax.evaluation.benchmarks import find
from vl3_jax.evaluation.benchmarks.synthetic import QuestionSelection

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random checkpoint of the size of nano, for which other modules compile the same programs."""
    return str(write_small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", size="nano"))


def failure(capsys, *arguments) -> str:
    assert main(["eval", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vl3 eval: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def rows(text):
    """The first word of each line of the table of synthetic tasks."""
    return [line.split()[0] for line in text.splitlines()[1:]]


def test_asks_prints_saves_and_scores_again(capsys, checkpoint, tmp_path):
    out = tmp_path / "out"
    command = ["eval", "--model", checkpoint, "--tasks", "nano/addition,nano/digit", "--count", "2", "--out", str(out)]
    assert main(command) == 0
    captured = capsys.readouterr()
    table = captured.out
    assert rows(table) == ["task", "nano/addition", "nano/digit", "mean"]
    assert "4 answers in" in captured.err
    results = json.loads((out / "results.json").read_text())
    assert results["tasks"]["nano/digit"]["n"] == 2
    assert (results["protocol"]["model"], results["protocol"]["max_frames"]) == (checkpoint, 180)
    assert {path.name for path in out.iterdir()} == {
        *("answers.jsonl", "run.json", "results.json", "results.md", "results.html", "samples.jsonl", "worst.html")
    }
    assert "<img" in (out / "worst.html").read_text()
    answers = (out / "answers.jsonl").read_bytes()

    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == table
    assert "0 answers in" in captured.err
    assert (out / "answers.jsonl").read_bytes() == answers

    for source in (out / "answers.jsonl", out):
        (out / "results.json").unlink()
        assert main(["eval", "--score-only", str(source)]) == 0
        assert sorted(capsys.readouterr().out.splitlines()) == sorted(table.splitlines())
        assert json.loads((out / "results.json").read_text())["tasks"] == results["tasks"]

    # Tasks of a run can be scored alone, and more questions asked; those of another seed need another folder.
    assert main([*command, "--tasks", "nano/digit"]) == 0
    assert "addition" not in capsys.readouterr().out
    assert main([*command, "--tasks", "nano/digit", "--count", "3"]) == 0
    assert "1 answers in" in capsys.readouterr().err
    assert "seed" in failure(capsys, *command[1:], "--seed", 8)
    assert "max_frames" in failure(capsys, *command[1:], "--max-frames", 8)
    assert "blind" in failure(capsys, *command[1:], "--tasks", "nano/digit", "--blind")


@pytest.mark.slow
def test_shards_are_scored_when_all_are_there(capsys, checkpoint, tmp_path):
    command = ["eval", "--model", checkpoint, "--tasks", "nano/digit,nano/when", "--count", "4"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    whole = capsys.readouterr().out
    for number in (3, 1, 4):
        assert main([*command, "--out", str(tmp_path / "parts"), "--shard", f"{number}/4"]) == 0
        assert f"shard {number}/4 is done" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "results.json").exists()
    assert main([*command, "--out", str(tmp_path / "parts"), "--shard", "2/4"]) == 0
    assert capsys.readouterr().out == whole
    tasks = [json.loads((tmp_path / name / "results.json").read_text())["tasks"] for name in ("whole", "parts")]
    assert tasks[0] == tasks[1]
    # Without shards nothing is left to ask.
    assert main([*command, "--out", str(tmp_path / "parts")]) == 0
    assert "0 answers in" in capsys.readouterr().err


@pytest.mark.slow
def test_the_flags_of_the_model_and_its_media_reach_the_answers(capsys, checkpoint, tmp_path):
    """An adapter, an int8 cache and a budget of vision tokens, as `vl3 ask` takes them; the results record them."""
    model = vl3.load(checkpoint)
    adapter = write_adapter(tmp_path / "adapter", model.engine.model.config)
    command = ["eval", "--model", checkpoint, "--tasks", "nano/static", "--count", "2", "--out", str(tmp_path / "out")]
    flags = ["--adapter", f"mine={adapter}", "--kv-cache", "int8", "--visual-budget", "13"]
    assert main([*command, *flags]) == 0
    model = vl3.load(checkpoint, kv_cache="int8", adapters={"mine": adapter})
    (benchmark,) = find(["nano/static"], QuestionSelection(count=2))
    for item, line in zip(
        benchmark.items(), (tmp_path / "out" / "answers.jsonl").read_text().splitlines(), strict=True
    ):
        settings = {"adapter": "mine", "visual_budget": 13, "max_new_tokens": benchmark.max_new_tokens}
        expected = model.answer(item.messages(None), **settings)
        record = json.loads(line)
        assert record["answer"] == expected.text.strip()
        assert record["answer"] != model.answer(item.messages(None), **settings | {"adapter": None}).text.strip()
        assert record["visual_tokens"] == expected.processed.visual_tokens
    protocol = json.loads((tmp_path / "out" / "results.json").read_text())["protocol"]
    used = [protocol[name] for name in ("adapter", "kv_cache", "visual_budget")]
    assert used == ["mine", "int8", 13]
    assert main([*command, *flags[2:]]) == 2, "answers of another adapter are not mixed"
    assert main([*command[:-1], str(tmp_path / "few"), "--visual-budget", "0.1"]) == 2
    assert "nano/static/0: visual_budget is 0.1" in capsys.readouterr().err


def test_other_media_and_every_token(capsys, checkpoint, tmp_path):
    command = ["eval", "--model", checkpoint, "--tasks", "nano/addition,nano/static", "--count", "2", "--blind"]
    assert main([*command, "--no-prune", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert rows(printed) == ["task", "nano/static", "mean"]  # sums have no media
    assert printed.splitlines()[2].split()[-1] == "100%"
    settings = json.loads((tmp_path / "run.json").read_text())
    assert (settings["blind"], settings["prune_threshold"]) == (True, None)
    assert "blind" in failure(capsys, *command[1:-1], "--no-prune", "--out", tmp_path)


def test_bad_commands_are_one_line(capsys, checkpoint, tmp_path):
    good = ["--model", checkpoint, "--tasks", "nano", "--out", tmp_path / "out"]
    assert "--model" in failure(capsys, "--tasks", "nano", "--out", tmp_path)
    assert "--tasks" in failure(capsys, "--model", checkpoint, "--out", tmp_path)
    assert "--out" in failure(capsys, "--model", checkpoint, "--tasks", "nano")
    assert "tennis" in failure(capsys, *good, "--tasks", "nano/tennis")
    assert "--count is 0" in failure(capsys, *good, "--count", 0)
    assert "seed" in failure(capsys, *good, "--seed", -1)
    for name in ("--batch", "--threads"):
        with pytest.raises(SystemExit, match="2"):  # from the parser
            failure(capsys, *good, name, 0)
        assert f"{name}: '0'" in capsys.readouterr().err
    assert "--shard 2/1" in failure(capsys, *good, "--shard", "2/1")
    assert "--max-frames" in failure(capsys, *good, "--max-frames", 0)
    assert "--data" in failure(capsys, *good, "--tasks", "videomme")
    assert "videomme" in failure(capsys, *good, "--tasks", "videomme", "--data", tmp_path)
    assert "nothing" in failure(capsys, *good, "--model", tmp_path / "nothing")
    assert "none.npz" in failure(capsys, *good, "--tasks", "nano/digit", "--images", tmp_path / "none.npz")
    assert "media" in failure(capsys, *good, "--tasks", "nano/addition", "--blind")
    assert "answers.jsonl" in failure(capsys, "--score-only", tmp_path / "answers.jsonl")
    assert "--model" in failure(capsys, "--score-only", tmp_path / "answers.jsonl", "--model", checkpoint)
    (tmp_path / "file").write_text("")
    assert "file" in failure(capsys, *good[:-1], tmp_path / "file")


def test_nano_is_the_folder_of_the_package(capsys, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(opening, "NANO_FOLDER", tmp_path)
    assert "no weights" in failure(capsys, "--model", "nano", "--tasks", "nano", "--out", tmp_path / "out")
    monkeypatch.setattr(opening, "NANO_FOLDER", type(tmp_path)(checkpoint))
    assert len(vl3.load("nano").processor.tokenizer) == 1024
