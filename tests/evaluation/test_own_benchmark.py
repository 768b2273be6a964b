"""The example of the documentation: a benchmark of one's own, from its file to the table."""

import json
import pathlib
import re

import pytest

from support.media import MEDIA
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError
from vl3_jax.evaluation import benchmarks

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The path of the example's file."""
    monkeypatch.setattr(benchmarks, "_registered", {})
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.splitlines()) < 40
    path = tmp_path / "colors.py"
    path.write_text(code)
    return str(path)


def test_the_example_of_the_documentation(capsys, example, tmp_path):
    folder = tmp_path / "data" / "colors"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").symlink_to(MEDIA / "images" / "coffee.png")
    rows = [{"id": n, "image": "a.png", "question": "Color?", "color": "red", "thing": "cup"} for n in range(2)]
    (folder / "colors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", str(tmp_path / "data"), "--tasks", example]
    assert main(["eval", "--check-data", *data]) == 0
    answers = tmp_path / "answers.jsonl"
    records = [{"id": f"colors/{n}", "task": "colors", "answer": answer} for n, answer in enumerate(("Red.", "hm"))]
    answers.write_text("".join(json.dumps(record) + "\n" for record in records))
    capsys.readouterr()
    assert main(["eval", "--score-only", str(answers), *data]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("colors ")][:2] == [
        ["colors", "cup", "50.0"],
        ["colors", "Overall", "50.0"],
    ]
    sample = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[1])
    assert (sample["reference"], sample["unparsed"]) == ({"target": "red", "task_type": "cup"}, "no color")
    assert "<img" in (tmp_path / "worst.html").read_text()
    summary = json.loads((tmp_path / "results.json").read_text())["tasks"]["colors"]
    assert (summary["headline"], summary["n_unparsed"]) == ({"Colors": 50.0}, 1)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("1 / 0", "ZeroDivisionError"), ("x = 1", "no subclass")]
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "own.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        benchmarks.find([str(path)])
