"""Every vector of scores and prompts reproduces, and a wrong one shows."""

import json

import pytest

from support.media import DATA
from vl3_jax.cli.main import main
from vl3_jax.evaluation import benchmarks, prompt_vectors, vectors

SCORES, PROMPTS = DATA / "evaluation" / "scores.jsonl", DATA / "evaluation" / "prompts.jsonl"


@pytest.mark.parametrize("flags", [[], ["--official-scoring"]], ids=["corrected", "official"])
@pytest.mark.parametrize(("path", "count"), [(SCORES, 422), (PROMPTS, 42)], ids=["scores", "prompts"])
def test_reproduces(capsys, path, count, flags):
    assert main(["eval", "--vectors", str(path), *flags]) == 0
    assert capsys.readouterr().out == f"{count} of {count} reproduce\n"


@pytest.mark.parametrize("path", [SCORES, PROMPTS], ids=["scores", "prompts"])
def test_every_benchmark_has_vectors(path):
    assert {vector["benchmark"] for vector in vectors.read(path)} == set(benchmarks.BENCHMARKS)


def test_each_prompt_vector_stands_alone():
    for vector in vectors.read(PROMPTS):
        assert list(prompt_vectors.check([vector])) == []


def test_a_wrong_score_shows(capsys, tmp_path):
    wrong = []
    for vector in vectors.read(SCORES):
        extra = vector["extra"]
        if extra["kind"] == "item" and isinstance(vector["score"], float) and "fixed_score" not in extra:
            wrong.append(vector | {"score": vector["score"] + 0.01})
    path = tmp_path / "wrong.jsonl"
    path.write_text("".join(json.dumps(vector) + "\n" for vector in wrong))
    assert main(["eval", "--vectors", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"0 of {len(wrong)} reproduce"
    assert len(lines) == len(wrong) + 1


def test_a_wrong_prompt_shows(capsys, tmp_path):
    wrong = [vector | {"instruction": vector["instruction"] + " "} for vector in vectors.read(PROMPTS)]
    path = tmp_path / "wrong.jsonl"
    path.write_text("".join(json.dumps(vector) + "\n" for vector in wrong))
    assert main(["eval", "--vectors", str(path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 42 reproduce"


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"benchmark": "AI2D"}',
        '{"benchmark": "tennis", "prediction": "A", "target": 0, "score": 1}',
        '{"benchmark": "videomme", "prediction": "A", "target": "A", "score": 1}',
        '{"benchmark": "AI2D", "raw": {}, "data_id": 1, "instruction": ""}',
        '{"benchmark": "perception_test", "raw": {}, "data_id": 1, "instruction": ""}',
        '{"benchmark": "AI2D", "raw": 3, "data_id": 1, "instruction": ""}',
        '{"benchmark": "AI2D", "prediction": ["A"], "target": [], "score": {}, '
        '"extra": {"kind": "aggregate", "samples": []}}',
    ],
)
def test_bad_vectors_are_one_line(capsys, tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    assert main(["eval", "--vectors", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_order_of_pictures_is_checked():
    (vector,) = [vector for vector in vectors.read(PROMPTS) if len(vector.get("image_order", ())) == 4][:1]
    wrong = vector | {"image_order": vector["image_order"][::-1]}
    ((_, difference),) = prompt_vectors.check([wrong])
    assert difference.startswith("image_order")
