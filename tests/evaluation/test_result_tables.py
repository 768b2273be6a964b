"""Tables beside the paper's columns, the page of the lowest scores, and the paper's protocol."""

import json

import pytest

from support.media import MEDIA
from vl3_jax.evaluation import benchmarks, result_tables, results, worst_page
from vl3_jax.evaluation.benchmark import Scoring
from vl3_jax.evaluation.protocol import EvalProtocol
from vl3_jax.processing.processor_config import ProcessorConfig


def answers():
    reference = {"target": 0, "task_type": "test"}
    image, video = str(MEDIA / "images" / "coffee.png"), str(MEDIA / "videos" / "city_night.mp4")
    ai2d = [{"id": f"AI2D/{n}", "task": "AI2D", "answer": a, "reference": reference} for n, a in enumerate("AB")]
    ai2d[1] |= {"question": "Which <b>?", "media": [{"type": "image", "image": image}]}
    charades = {
        "id": "charades_sta/0",
        "task": "charades_sta",
        "answer": "0 to 5",
        "reference": {"target": [0.0, 10.0]},
    }
    charades["media"] = [{"type": "video", "video": video}, {"type": "image", "image": "missing.png"}]
    return [*ai2d, charades]


@pytest.fixture
def scored(tmp_path):
    found = results.score_tasks(answers(), Scoring())
    return found, results.save(found, tmp_path, EvalProtocol().record(ProcessorConfig(), 1.05))


def test_every_row_of_the_paper_belongs_to_a_benchmark():
    rows = {row.name for benchmark in benchmarks.find(["paper"]) for row in benchmark.rows}
    tables = result_tables.paper_tables()
    assert rows == {name for table in tables.values() for name in table["rows"]}
    for table in tables.values():
        assert len(table["rows"]) == 13
        assert {len(values) for values in table["rows"].values()} == {len(table["models"])}
    assert tables["8"]["rows"]["Charades-STA"][-1] == 60.7
    assert tables["5"]["rows"]["GQA"][0] == [49.2, "reproduced"]


def test_values_stand_beside_the_papers(scored):
    _, content = scored
    markdown = result_tables.markdown(content, "mine")
    assert "| AI2D | 62.1\\* | 74.9 | 69.9 | 78.2 | 50.0 |" in markdown
    assert "| VideoLLaMA3 7B | mine |" in markdown
    assert "| charades_sta | R1@0.5 | 100.0 | 100.0 | 1 | 0 | 0 | 0 | 0 |" in markdown
    assert "AI2D: split test, corrected scoring, judge: none; 2 answers where the benchmark has 3088." in markdown
    assert "repetition_penalty 1.05" in markdown
    page = result_tables.as_html(content)
    assert page.count("<table>") == 5
    assert "<td>62.1*</td>" in page


def test_another_split_than_the_papers_is_named():
    reference = {"target": ["12"], "task_type": "val"}
    record = {"id": "DocVQA/1", "task": "DocVQA", "answer": "12", "reference": reference}
    summary = results.score_tasks([record], Scoring())["DocVQA"].summary
    markdown = result_tables.markdown({"tasks": {"DocVQA": summary}})
    assert "| DocVQA test | 81.6 | 88.7 | 90.1 | 91.9 | 100.0 (val) |" in markdown


def test_the_page_of_lowest_scores_has_pictures(scored, tmp_path):
    found, _ = scored
    samples = [sample for result in found.values() for sample in result.samples]
    page = worst_page.write(samples, tmp_path).read_text()
    assert page.index("AI2D/1: 0.00") < page.index("charades_sta/0: 0.50")
    assert "AI2D/0" not in page
    assert "Which &lt;b&gt;?" in page
    assert page.count("<img") == 1 + worst_page._FRAMES
    assert "missing.png" in page
    saved = [sample | {"frames": ["missing.png"]} for sample in samples]
    assert "<img" not in worst_page.write(saved, tmp_path).read_text()
    assert page.count("<section>") == 2
    assert worst_page.write(samples, tmp_path, 1).read_text().count("<section>") == 1


def test_the_protocol_overrides_the_checkpoint():
    checkpoint = ProcessorConfig(image_merge=2, fps=2, max_frames=16, max_tokens=1000, prune_threshold=None)
    image, video, digit = benchmarks.find(["AI2D", "mvbench", "nano/digit"])
    for benchmark, merge in ((image, 1), (video, 2), (digit, 2)):
        config = EvalProtocol().settings(checkpoint, benchmark).processor
        assert (config.image_merge, config.video_merge) == (merge, 2)
        assert (config.fps, config.max_frames, config.max_tokens) == (1, 180, 16384)
        assert config.prune_threshold is None
        assert EvalProtocol(image_merge=1).settings(checkpoint, benchmark).processor.image_merge == 1
    pruned = ProcessorConfig()
    assert EvalProtocol(prune=False).settings(pruned, video).processor.prune_threshold is None
    assert EvalProtocol().settings(pruned, video).processor.prune_threshold == pruned.prune_threshold
    assert EvalProtocol(visual_budget=0.5).settings(pruned, video).processor.visual_budget == 0.5
    assert EvalProtocol(max_new_tokens=9).settings(pruned, digit).sampling.max_new_tokens == 9
    assert EvalProtocol().settings(pruned, digit).sampling.max_new_tokens == digit.max_new_tokens
    assert EvalProtocol().settings(pruned, video).sampling.max_new_tokens == 2048
    assert EvalProtocol().settings(pruned, video, 1.05).sampling.repetition_penalty == 1.05
    assert EvalProtocol(repetition_penalty=1.2).settings(pruned, video, 1.05).sampling.repetition_penalty == 1.2
    assert EvalProtocol(adapter="mine").settings(pruned, video).adapter == "mine"


def test_the_protocol_is_recorded():
    checkpoint = ProcessorConfig(image_merge=2)
    record = json.loads(json.dumps(EvalProtocol("Be brief.", max_frames=8).record(checkpoint, 1.05)))
    assert (record["system"], record["repetition_penalty"], record["decoding"]) == ("Be brief.", 1.05, "greedy")
    assert (record["max_frames"], record["max_visual_tokens"], record["max_new_tokens"]) == (8, 16384, 2048)
    assert record["image_merge"] == {"image benchmarks": 1, "others": 2}


@pytest.mark.parametrize("settings", [{"temperature": 1}, {"max_frames": 0}, {"speed": 3}, {"fps": "fast"}])
def test_what_is_no_setting_of_a_protocol_is_refused(settings):
    with pytest.raises(benchmarks.InputError, match=next(iter(settings))):
        EvalProtocol(**settings)
