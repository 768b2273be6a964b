"""Each benchmark on a made-up folder in its real layout: load, prompt, answer, score, table."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

from support.benchmark_items import CASES
from support.checkpoints import write_small_checkpoint
from support.mask_items import MASK_CASES, write_refcoco
from support.sa2va_models import write_small_sa2va
from vl3_jax.cli.main import main
from vl3_jax.evaluation import benchmarks, layouts, results
from vl3_jax.evaluation.benchmark import Scoring
from vl3_jax.processing.messages import parse_messages
from vl3_jax.processing.processor import open_media
from vl3_jax.processing.processor_config import ProcessorConfig

ALL_CASES = CASES | MASK_CASES


@pytest.fixture(params=ALL_CASES.values(), ids=ALL_CASES)
def case(request, tmp_path):
    """A case whose folder is written."""
    if request.param.task == "region_captions":
        pytest.importorskip("nltk")
    request.param.write(tmp_path)
    return request.param


def load(case, root):
    (benchmark,) = benchmarks.find([case.task])
    return benchmark, benchmark.load(root)


def frame_times(part):
    """Returns the times of the frames that the model would see."""
    (turn,) = parse_messages([{"role": "user", "content": [part]}])
    return open_media(turn.media[0], ProcessorConfig()).timestamps


def answer_file(path: pathlib.Path, case, items, responses) -> str:
    (benchmark,) = benchmarks.find([case.task])
    records = [results.answer_record(benchmark.task, *pair) for pair in zip(items, responses, strict=True)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


UNCHECKED = ("OCR Bench", "Region captions")  # headlines: a sum, and METEOR if WordNet is there


def test_from_files_to_the_table(capsys, case, tmp_path):
    benchmark, items = load(case, tmp_path)
    assert len({item.id for item in items}) == len(items) == len(case.responses)
    for item in items:
        assert not item.missing_media()
        (turn,) = parse_messages(item.messages(frame_times))
        assert [part.kind for part in turn.media] == [part["type"] for part in item.media]
        for part in turn.media:
            open_media(part, ProcessorConfig())
    path = answer_file(tmp_path / "answers.jsonl", case, items, case.responses)
    assert main(["eval", "--score-only", path, "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    summary = content["tasks"][benchmark.task]
    values = {name: summary["headline"][name] for name in summary["headline"] if name not in UNCHECKED}
    assert values == pytest.approx(case.headline)
    markdown = (tmp_path / "out" / "results.md").read_text()
    for name in case.headline if case.task in CASES else ():  # the others are in no table of the paper
        assert name in printed
        assert f"| {name} |" in markdown
    worst = (tmp_path / "out" / "worst.html").read_text()
    assert ("<img" in worst) == bool(summary["n"]), "every case with a score has a wrong answer"
    if benchmark.submission and summary["n_unscored"] and not benchmark.draws:
        submission = json.loads((tmp_path / "out" / f"{case.task}.submission.json").read_text())
        assert len(submission) == (1 if case.benchmark == "perception_test" else len(items))


def test_missing_samples_fail(capsys, case, tmp_path):
    benchmark, items = load(case, tmp_path)
    path = answer_file(tmp_path / "answers.jsonl", case, items[1:], case.responses[1:])
    flags = ["--data", str(tmp_path), "--tasks", case.task, "--out", str(tmp_path / "out")]
    assert main(["eval", "--score-only", path, *flags]) == 2
    assert f"{benchmark.task}: 1" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"][benchmark.task]["n_missing"] == 1


def test_errors_and_missing_media_are_counted(case, tmp_path):
    benchmark, items = load(case, tmp_path)
    no_media = [results.answer_record(benchmark.task, items[0], None, error="a.mp4: missing", missing_media=True)]
    others = [results.answer_record(benchmark.task, item, "") for item in items[1:]]
    result = results.score_tasks([*no_media, *others], Scoring())[benchmark.task]
    assert (result.summary["n_error"], result.summary["n_missing_media"], result.missing) == (0, 1, 1)
    json.dumps(result.summary)


def test_data_check(capsys, case, tmp_path):
    _, items = load(case, tmp_path)
    command = ["eval", "--check-data", "--data", str(tmp_path), "--tasks", case.task]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"{case.task}: complete, {len(items)} questions" in printed
    assert "licence: " in printed
    for item in items:
        for part in item.media:
            if isinstance(part[part["type"]], str) and pathlib.Path(part[part["type"]]).is_file():
                pathlib.Path(part[part["type"]]).unlink()
    files = [path for item in items for path in item.missing_media()]
    annotations = [
        path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".parquet", ".csv", ".txt")
    ]
    if files:
        assert main(command) == 2
        assert f"missing: {pathlib.Path(files[0]).with_suffix('')}" in capsys.readouterr().out
    for path in annotations:
        path.write_bytes(b"[{}]")
    assert main(command) == 2
    printed = capsys.readouterr().out
    assert "INCOMPLETE" in printed
    assert "layout: " in printed


def test_items_share_media(tmp_path):
    for name, groups in (("videomme", 1), ("lvbench", 1), ("mvbench", 2), ("BLINK", 2)):
        CASES[name].write(tmp_path)
        _, items = load(CASES[name], tmp_path)
        assert len({item.media_key for item in items}) == groups


def test_ids_that_occur_twice_are_kept(caplog, tmp_path):
    case = CASES["AI2D"]
    layouts.write("AI2D", [row | {"question_id": 7} for row in case.rows], tmp_path / "AI2D")
    _, items = load(case, tmp_path)
    assert [item.id for item in items] == ["7", "7#2"]
    assert "occur more than once" in caplog.text


def test_names_splits_and_groups():
    assert [benchmark.task for benchmark in benchmarks.find(["VideoMME", "blink@test", "videomme"])] == [
        "videomme",
        "BLINK@test",
    ]
    assert len(benchmarks.find(["images"])) == 13
    assert sum(len(benchmark.rows) for benchmark in benchmarks.find(["videos"])) == 13
    for name in ("tennis", "AI2D@val"):
        with pytest.raises(benchmarks.InputError):
            benchmarks.find([name])


def test_subtitles_that_are_not_utf8(tmp_path):
    case = CASES["videomme"]
    case.write(tmp_path)
    (tmp_path / "videomme" / "subtitles" / "v.srt").write_bytes(b"1\r\n00:00:00,000 --> 00:00:09,000\r\ncaf\xe9\r\n")
    _, items = load(case, tmp_path)
    (text,) = [part["text"] for part in items[1].content(frame_times) if part["type"] == "text"]
    assert text.startswith("This video's subtitles are listed below:\ncaf\ufffd\nSelect the best")


def test_answers_that_failed_are_counted_once():
    reference = {"target": 0, "task_type": "test"}
    records = [
        {"id": f"AI2D/{n}", "task": "AI2D", "reference": reference, **record}
        for n, record in enumerate([{"answer": "A"}, {"answer": None}, {"answer": None, "error": "out of memory"}])
    ]
    summary = results.score_tasks([*records, records[0]], Scoring())["AI2D"].summary
    assert (summary["n"], summary["n_error"], summary["n_unparsed"]) == (3, 2, 2)
    assert summary["metrics"]["Overall"] == pytest.approx(100 / 3)
    with pytest.raises(benchmarks.InputError, match="AI2D/0: the answer has no reference"):
        results.score_tasks([records[0] | {"reference": None}], Scoring())
    with pytest.raises(benchmarks.InputError, match="not of videomme"):
        results.score_tasks([records[0] | {"task": "videomme"}], Scoring())


def test_groups_that_are_left_out_are_named(caplog, tmp_path):
    CASES["BLINK"].write(tmp_path)
    shutil.rmtree(tmp_path / "BLINK" / "Counting")
    _, items = load(CASES["BLINK"], tmp_path)
    assert len(items) == 1
    assert "no folder Counting; 1 are left out" in caplog.text


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny random checkpoint."""
    return str(write_small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small"))


@pytest.fixture(scope="module")
def sa2va(tmp_path_factory):
    """A tiny random checkpoint that draws masks."""
    return str(write_small_sa2va(tmp_path_factory.mktemp("checkpoint")))


# In the quick tests one of each kind of prompt: an image, images in the text, part of a video, two kinds of subtitles.
QUICK_CASES = ("AI2D", "MMMU", "mvbench", "videomme", "longvideobench")
MASKS = [case for case in MASK_CASES.values() if "@" not in case.task]  # the group "masks"


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK_CASES)) for n in (*CASES, "masks")]
)
def test_a_model_is_asked_resumed_and_sharded(capsys, name, request, tmp_path):
    """From the files to the results; after a kill nothing is asked twice; four shards give the same scores."""
    cases, data = MASKS if name == "masks" else [CASES[name]], tmp_path / "data"
    for case in cases:
        case.write(data)
    model, count = (
        request.getfixturevalue("sa2va" if name == "masks" else "small"),
        sum(len(c.responses) for c in cases),
    )
    command = ["eval", "--model", model, "--tasks", name, "--data", str(data)]
    command += ["--max-new-tokens", "3", "--max-visual-tokens", "64"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr()
    assert f"{count} answers in" in printed.err
    answers = (tmp_path / "whole" / "answers.jsonl").read_text().splitlines(keepends=True)
    assert len(answers) == count
    tasks = json.loads((tmp_path / "whole" / "results.json").read_text())["tasks"]
    assert all(task[count] == 0 for task in tasks.values() for count in ("n_error", "n_missing", "n_missing_media"))

    (tmp_path / "whole" / "answers.jsonl").write_text("".join(answers[:-1]) + answers[-1][:20])
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert "1 answers in" in capsys.readouterr().err
    assert (tmp_path / "whole" / "answers.jsonl").read_text().splitlines(keepends=True) == answers

    for number in range(1, 5):
        assert main([*command, "--out", str(tmp_path / "parts"), "--shard", f"{number}/4"]) == 0
    assert capsys.readouterr().out.endswith(printed.out)
    assert json.loads((tmp_path / "parts" / "results.json").read_text())["tasks"] == tasks


PATIENCE = 300  # seconds for whatever must happen, on a machine with other work too


def started(command):
    """A process of its own."""
    environment = os.environ | {"XLA_FLAGS": ""}
    return subprocess.Popen([sys.executable, "-m", "vl3_jax.cli.main", *command], env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(("names", "count"), [("AI2D", 4), ("refcoco,mevis", 2)])
def test_processes_of_a_job(names, count, request, tmp_path):
    """They share the questions and the first one scores all; samples without an answer end all of them with 2."""
    data, ending = tmp_path / "data", "png" if names == "AI2D" else "jpg"
    if names == "AI2D":
        rows = [row | {"question_id": number} for number, row in enumerate(CASES["AI2D"].rows * 4)]
        layouts.write("AI2D", rows, data / "AI2D")
    else:
        for name in names.split(","):
            MASK_CASES[name].write(data)
    model = request.getfixturevalue("small" if names == "AI2D" else "sa2va")
    command = ["eval", "--model", model, "--tasks", names, "--data", str(data)]
    command += ["--max-new-tokens", "3", "--max-visual-tokens", "64"]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0

    def job():
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            flags = ["--coordinator", f"127.0.0.1:{server.getsockname()[1]}", "--processes", str(count)]
        processes = [
            started([*command, "--out", str(tmp_path / "several"), *flags, "--process-id", str(number)])
            for number in range(count)
        ]
        return [process.wait(PATIENCE) for process in processes]

    assert job() == [0] * count
    files = sorted(path.name for path in (tmp_path / "several").glob("answers*.jsonl"))
    assert files == [f"answers-{number}-of-{count}.jsonl" for number in range(1, count + 1)]
    tasks = [json.loads((tmp_path / name / "results.json").read_text())["tasks"] for name in ("one", "several")]
    assert tasks[0] == tasks[1]
    for path in data.rglob(f"*.{ending}"):
        path.unlink()
    shutil.rmtree(tmp_path / "several")
    assert job() == [2] * count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano/caption", "refcoco"])
def test_a_killed_process_has_lost_nothing(capsys, name, request, tmp_path):
    command = ["eval", "--model", "nano", "--tasks", name, "--count", "200", "--batch", "2"]
    if name == "refcoco":
        write_refcoco(tmp_path / "data" / "refcoco", phrases=199)
        command[2] = request.getfixturevalue("sa2va")
        command += ["--data", str(tmp_path / "data"), "--max-new-tokens", "3", "--max-visual-tokens", "16"]
    process = started([*command, "--out", str(tmp_path / "killed")])
    file, deadline = tmp_path / "killed" / "answers.jsonl", time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not (file.exists() and file.read_bytes().count(b"\n") > 4):
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 4 < len(before) < 200
    assert main([*command, "--out", str(tmp_path / "killed")]) == 0
    assert f"{200 - len(before)} answers in" in capsys.readouterr().err
    ids = [json.loads(line)["id"] for line in file.read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 200
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    tasks = [json.loads((tmp_path / name / "results.json").read_text())["tasks"] for name in ("killed", "whole")]
    assert tasks[0] == tasks[1]
