"""`vl3 eval` on a tiny random checkpoint, and the name `nano`."""

import json

import pytest

import vl3_jax as vl3
from support.checkpoints import write_small_checkpoint
from vl3_jax.checkpoint import opening
from vl3_jax.cli.main import main

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


def test_asks_prints_saves_and_scores_again(capsys, checkpoint, tmp_path):
    out = tmp_path / "out"
    command = ["eval", "--model", checkpoint, "--tasks", "nano/addition,nano/digit", "--count", "2", "--out", str(out)]
    assert main(command) == 0
    captured = capsys.readouterr()
    table = captured.out
    assert [line.split()[0] for line in table.splitlines()] == ["task", "nano/addition", "nano/digit", "mean"]
    assert "4 answers in" in captured.err
    scores = json.loads((out / "scores.json").read_text())
    assert scores["tasks"]["nano/digit"]["count"] == 2
    answers = (out / "answers.jsonl").read_bytes()

    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == table
    assert "0 answers in" in captured.err
    assert (out / "answers.jsonl").read_bytes() == answers

    (out / "scores.json").unlink()
    assert main(["eval", "--score-only", str(out / "answers.jsonl")]) == 0
    assert capsys.readouterr().out == table
    assert json.loads((out / "scores.json").read_text()) == scores

    # Tasks of a run can be scored alone; a run with other questions needs another folder.
    assert main([*command, "--tasks", "nano/digit"]) == 0
    assert "addition" not in capsys.readouterr().out
    assert "seed" in failure(capsys, *command[1:], "--seed", 8)
    assert "blind" in failure(capsys, *command[1:], "--tasks", "nano/digit", "--blind")


def test_other_media_and_every_token(capsys, checkpoint, tmp_path):
    command = ["eval", "--model", checkpoint, "--tasks", "nano/addition,nano/static", "--count", "2", "--blind"]
    assert main([*command, "--no-prune", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["task", "nano/static", "mean"]  # sums have no media
    assert lines[1].split()[-1] == "100%"
    settings = json.loads((tmp_path / "run.json").read_text())
    assert (settings["blind"], settings["prune"]) == (True, False)
    assert "blind" in failure(capsys, *command[1:-1], "--no-prune", "--out", tmp_path)


def test_bad_commands_are_one_line(capsys, checkpoint, tmp_path):
    good = ["--model", checkpoint, "--tasks", "nano", "--out", tmp_path / "out"]
    assert "--model" in failure(capsys, "--tasks", "nano", "--out", tmp_path)
    assert "--tasks" in failure(capsys, "--model", checkpoint, "--out", tmp_path)
    assert "--out" in failure(capsys, "--model", checkpoint, "--tasks", "nano")
    assert "tennis" in failure(capsys, *good, "--tasks", "nano/tennis")
    assert "--count is 0" in failure(capsys, *good, "--count", 0)
    assert "seed" in failure(capsys, *good, "--seed", -1)
    with pytest.raises(SystemExit, match="2"):  # from the parser
        failure(capsys, *good, "--batch", 0)
    assert "--batch: '0'" in capsys.readouterr().err
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
