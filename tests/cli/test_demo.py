"""`vl3 demo` on a tiny random checkpoint: its output and its report."""

import base64
import dataclasses
import html
import io
import re

import numpy as np
import pytest
from PIL import Image

from data_pipelines.synthetic.registry import example
from support.checkpoints import write_small_checkpoint
from vl3_jax.cli import demo, demo_report
from vl3_jax.cli.main import main
from vl3_jax.evaluation.benchmarks import find
from vl3_jax.processing.packed_batch import Visual

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random checkpoint of the size of nano, for which other modules compile the same programs."""
    return str(write_small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", size="nano"))


@pytest.mark.slow
def test_asks_six_questions_and_reports_them(capsys, checkpoint, tmp_path):
    seed = 1  # with a stream
    report = tmp_path / "demo.html"
    arguments = ["--model", checkpoint, "--seed", str(seed), "--max-new-tokens", "8", "--out", str(report)]
    assert main(["demo", *arguments]) == 0
    text = capsys.readouterr().out
    assert str(report) in text
    assert re.search(r"\d of 6 right", text)
    page = report.read_text()
    assert "://" not in page
    images = 0
    for task in demo.TASKS[seed]:
        sample = example(task, "test", seed, 0)
        assert sample.question in text
        assert html.escape(sample.question) in page
        reference = sample.reference.get("words", sample.answer)
        assert f"reference  {demo_report.one_line(reference)}" in text
        assert html.escape(demo_report.one_line(reference)) in page
        images += sample.video.num_frames if sample.video else len(sample.media)
        for time in sample.video.times if sample.video else ():
            assert f"{time:.1f} s" in page
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(sources) == images
    first = Image.open(io.BytesIO(base64.b64decode(sources[0])))
    assert min(first.size) >= 56
    assert 'class="box reference"' in page


def demo_answer(**changes):
    visual = Visual(np.zeros((4, 588), np.uint8), (1, 2, 2))
    base = demo_report.DemoAnswer("digit", "Q?", "<b>7</b>", "7", False, "", {}, [visual], None, "1 token")
    return dataclasses.replace(base, **changes)


def test_model_output_is_escaped_in_the_report(tmp_path):
    video = Visual(np.zeros((8, 588), np.uint8), (2, 2, 2))
    stream = demo_answer(answer=[None, "<i>1"], reference=["1", None], visuals=[video], times=[0.0, 1.0], correct=True)
    boxes = {"reference": [0, 0, 500, 500], "answer": [100, 100, 900, 1000]}
    demo_report.write(tmp_path / "report.html", [demo_answer(boxes=boxes), stream], "a & b")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;7&lt;/b&gt; ✗" in page
    assert "<b>" not in page
    assert "1.0 s: “&lt;i&gt;1”" in page
    assert "a &amp; b: 1 of 2 right" in page
    assert "left:10.0%;top:10.0%;width:80.0%;height:90.0%" in page


@pytest.mark.parametrize(
    ("task", "answer", "reference", "correct"),
    [
        ("digit", " 7.", {"answer": "7"}, True),
        ("box", "[[0,0,500,900]]", {"answer": "<ref>the 4</ref>[[0,0,500,1000]]"}, True),
        ("box", "nowhere", {"answer": "<ref>the 4</ref>[[0,0,500,1000]]"}, False),
        ("when", "0.0-4.0 s", {"answer": "1.0-4.0 s", "span": [1.0, 4.0]}, True),
        ("when", "0.0-1.0 s", {"answer": "1.0-4.0 s", "span": [1.0, 4.0]}, False),
    ],
)
def test_answers_are_judged(task, answer, reference, correct):
    (eval_task,) = find([f"nano/{task}"])
    judgement, detail, boxes = demo.judge(eval_task, answer, reference)
    assert judgement == correct
    assert bool(detail) == (task != "digit")
    assert set(boxes) == ({"reference", "answer"} if "[[" in answer else {"reference"} if task == "box" else set())


def test_bad_input_is_one_line(capsys, checkpoint, tmp_path):
    for arguments, message in [
        (["--model", str(tmp_path / "nowhere")], "nowhere"),
        (["--model", checkpoint, "--out", str(tmp_path / "no" / "demo.html")], "no folder"),
        (
            ["--model", checkpoint, "--max-new-tokens", "0", "--out", str(tmp_path / "demo.html")],
            "--max-new-tokens is 0",
        ),
    ]:
        assert main(["demo", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("vl3 demo: ")
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):  # from the parser
        main(["demo", "--model", checkpoint, "--seed", "-1"])
    assert "--seed: '-1'; give a whole number from 0" in capsys.readouterr().err
