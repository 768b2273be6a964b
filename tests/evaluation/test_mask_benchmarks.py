"""Benchmarks of masks: questions, scores by hand, submissions, and answers and data that are wrong."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from support.mask_items import (
    FRAMES,
    HEIGHT,
    LEFT,
    MASK_CASES,
    RIGHT,
    WIDTH,
    answer,
    mask,
    write_colours,
    write_json,
    write_mask_table,
    write_refcoco,
)
from support.sa2va_models import write_small_sa2va
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError
from vl3_jax.evaluation import benchmarks
from vl3_jax.evaluation.benchmark import ScoredAnswer, Scoring
from vl3_jax.evaluation.in_training import TrainingBenchmarks
from vl3_jax.evaluation.prompts import questions_of, swap_media
from vl3_jax.evaluation.results import answer_record, score_tasks
from vl3_jax.processing.mask_files import decode_rle, encode_rle
from vl3_jax.processing.messages import Region
from vl3_jax.training.run_config import EvalConfig

BOTH = LEFT | RIGHT


def load(name, root):
    MASK_CASES[name].write(root)
    (benchmark,) = benchmarks.find([name])
    return benchmark, benchmark.load(root)


def metrics(benchmark, items, responses, scoring=None) -> dict:
    pairs = zip(items, responses, strict=True)
    verdicts = [(benchmark.score(response, item.reference, scoring or Scoring()), item) for item, response in pairs]
    return benchmark.metrics([ScoredAnswer(verdict, item.reference) for verdict, item in verdicts])


def test_every_benchmark_of_masks_is_tried():
    assert {case.benchmark for case in MASK_CASES.values()} == set(benchmarks.MASK_BENCHMARKS)
    found = benchmarks.find(["masks"])
    assert [benchmark.name for benchmark in found] == list(benchmarks.MASK_BENCHMARKS)
    assert len({row.name for benchmark in found for row in benchmark.rows}) == len(found)


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_phrases_of_images(name, tmp_path):
    benchmark, items = load(name, tmp_path)
    texts = [f" Please segment {phrase} in this image." for phrase in ("left box", "box 1", "right box")]
    assert [item.text for item in items] == texts
    assert (decode_rle(items[0].reference["target"]) == LEFT).all()
    right = answer([LEFT]), answer([mask(10, 15), mask(15, 20)]), answer([RIGHT])
    assert metrics(benchmark, items, right) == {"cIoU": 100, "gIoU": 100}
    wrong = answer([mask(10, 15)]), "There is none.", answer([RIGHT])
    found = metrics(benchmark, items, wrong)
    assert found["cIoU"] == pytest.approx(100 * (100 + 400) / (200 + 200 + 400))
    assert found["gIoU"] == pytest.approx(100 * 1.5 / 3)
    assert benchmark.score(wrong[1], items[1].reference, Scoring()).unparsed == "no mask"


@pytest.mark.parametrize("name", ["mevis", "revos", "ref_sav", "ref_davis17", "ref_ytvos@train"])
def test_expressions_of_videos(name, tmp_path):
    benchmark, items = load(name, tmp_path)
    first, second = items
    assert [first.id, second.id] == ["v/0", "v/1"]
    assert [len(item.media) for item in items] == [2, 2]
    assert first.text.startswith("Please segment ")
    assert [path[-9:] for path in first.frames] == [f"{frame}.jpg" for frame in FRAMES]
    other = [RIGHT, RIGHT] if name.startswith(("ref_d", "ref_y")) else [LEFT, BOTH]
    right = answer([LEFT], [LEFT]), answer(*([each] for each in other))
    found = metrics(benchmark, items, right)
    assert {found[measure] for measure in (*benchmark.measures, "Overall")} == {100}
    found = metrics(benchmark, items, (right[0], answer([], [])))
    assert (found["J"], found["F"], found["Overall"]) == (50, 50, 50)
    groups = {"ref_sav": ("long", "short"), "revos": ("referring", "reasoning")}.get(name, ())
    assert [found[group]["J&F"] for group in groups] == [100, 0][: len(groups)]
    assert set(found) == {*groups, *benchmark.measures, "Overall"}


def test_the_mean_over_groups_is_of_those_that_are_there(tmp_path):
    """Three long expressions and one short one weigh as much; where all are long, they are the score."""
    benchmark, (long, short) = load("ref_sav", tmp_path)
    right, wrong = answer([LEFT], [LEFT]), answer([], [])
    assert metrics(benchmark, [long, long, long, short], [right, right, wrong, wrong])["Overall"] == pytest.approx(
        (200 / 3 + 0) / 2
    )
    found = metrics(benchmark, [long, long], [right, wrong])
    assert set(found) == {"long", "J", "F", "Overall"}
    assert found["Overall"] == 50


def test_accuracy_and_robustness(tmp_path):
    """One frame has 200 of 2,400 pixels too many, where all objects are 600; the other one is right."""
    benchmark, (first, _) = load("revos", tmp_path)
    verdict = benchmark.score(answer([LEFT, mask(30, 40)], [LEFT]), first.reference, Scoring())
    assert verdict.parsed["R"] == pytest.approx((2 / 3 + 1) / 2)
    assert verdict.parsed["A"] == pytest.approx((2200 / 2400 + 1) / 2)
    found = benchmark.metrics([ScoredAnswer(verdict, first.reference)])
    assert found["referring"]["R"] == found["R"] == pytest.approx(100 * 5 / 6)


def test_an_expression_of_nothing(tmp_path):
    """MeViS has such: no mask is the right answer."""
    MASK_CASES["mevis"].write(tmp_path)
    path = tmp_path / "mevis" / "valid_u" / "meta_expressions.json"
    content = json.loads(path.read_text())
    content["videos"]["v"]["expressions"] = {"0": {"exp": "a whale", "anno_id": []}}
    path.write_text(json.dumps(content))
    (benchmark,) = benchmarks.find(["mevis"])
    (item,) = benchmark.load(tmp_path)
    for response, score in ((answer([], []), 1), (answer([EMPTY], [EMPTY]), 1), (answer([LEFT], [EMPTY]), 0.5)):
        verdict = benchmark.score(response, item.reference, Scoring())
        assert (verdict.score, verdict.unparsed) == (score, None)


EMPTY = np.zeros((HEIGHT, WIDTH), bool)


def test_grounded_captions(tmp_path):
    benchmark, (item,) = load("gcg", tmp_path)
    assert item.text.startswith("Could you please give me a brief description")
    right = {"caption": "A box near two bars.", "phrases": ["the box", "bars"]}
    found = metrics(benchmark, [item], [answer([LEFT, RIGHT], **right)])
    assert (found["mIoU"], found["Recall (lemmas)"], found["AP50"]) == (100, 100, 100)
    swapped = answer([RIGHT, LEFT], **right)
    found = metrics(benchmark, [item], [swapped])
    assert (found["mIoU"], found["Recall (lemmas)"], found["AP50"]) == (100, 0, 100)
    for response in (answer([]), "A box near two bars."):
        nothing = metrics(benchmark, [item], [response])
        assert [nothing[name] for name in ("mIoU", "Recall (lemmas)", "AP50")] == [0, 0, 0]
    benchmark.similarity = lambda first, second: np.ones((len(first), len(second)))
    assert metrics(benchmark, [item], [swapped])["Recall"] == 100


def test_what_was_not_answered_counts_as_nothing(tmp_path):
    """An image without an answer has its targets, and 0 of them are found."""
    _, (item,) = load("gcg", tmp_path)
    right = answer([LEFT, RIGHT], caption="", phrases=["the box", "bars"])
    records = [
        answer_record("gcg", item, right),
        {**answer_record("gcg", item, None, error="no memory"), "id": "gcg/sa_2"},
    ]
    summary = score_tasks(records, Scoring())["gcg"].summary
    assert (summary["metrics"]["mIoU"], summary["metrics"]["Recall (lemmas)"]) == (50, 50)
    assert summary["n_error"] == 1


def test_ties_do_not_depend_on_the_order_of_answers(tmp_path):
    """All masks have the same confidence, so that AP50 goes by the order of images."""
    _, (item,) = load("gcg", tmp_path)
    responses = [answer([LEFT, mask(0, 5)], phrases=["", ""]), answer([mask(0, 5)], phrases=[""])]
    records = [
        {**answer_record("gcg", item, response), "id": f"gcg/{number}"} for number, response in enumerate(responses)
    ]
    found = [score_tasks(order, Scoring())["gcg"].summary["metrics"] for order in (records, records[::-1])]
    assert found[0] == found[1]


def test_region_captions(tmp_path, monkeypatch):
    meteor = pytest.importorskip("vl3_jax.evaluation.scorers.meteor")
    pytest.importorskip("nltk")
    monkeypatch.setattr(meteor, "_wordnet", lambda: None)
    benchmark, items = load("region_captions", tmp_path)
    assert [(item.id, item.reference["target"]) for item in items] == [
        ("9", ["a red box"]),
        ("11", ["the bar on the right"]),
    ]
    (turn,) = items[0].messages(lambda part: ())
    before, region, after = turn.parts[1:]
    assert before == "There are 1 part regions in the picture: region1"
    assert isinstance(region, Region)
    assert (region.mask == LEFT).all()
    assert after.endswith(".\nPlease give me a short description of the region in the picture marked by region1.")
    whole = 1 - 0.5 / 3**3  # of three words in one chunk
    for opening in ("", "Region1 is ", "region 1: ", "The region marked by region1 is ", "The region1 shows "):
        caption = f"{opening}a red box."
        assert benchmark.score(caption, items[0].reference, Scoring()).score == pytest.approx(whole), caption
    official = benchmark.score("region1 is a thistle", items[0].reference, Scoring(official=True))
    assert official.parsed == "a thtle", "the original takes out these letters everywhere"
    assert benchmark.score("Region1:", items[0].reference, Scoring()).unparsed == "no caption"
    assert metrics(benchmark, items, ["a red box", "zebra"]) == {"METEOR (exact, stem)": pytest.approx(50 * whole)}


def test_without_nltk(tmp_path, monkeypatch, capsys):
    """Captions of regions are not asked for; in grounded captions METEOR is named and has no value."""
    from vl3_jax.evaluation.scorers import meteor

    def missing(*_):
        raise InputError("METEOR is not available: NLTK is not installed; run `pip install nltk`")

    monkeypatch.setattr(meteor, "_nltk", missing)
    meteor._wordnet.cache_clear()
    meteor.available_meteor.cache_clear()
    MASK_CASES["region_captions"].write(tmp_path)
    assert main(["eval", "--check-data", "--data", str(tmp_path), "--tasks", "region_captions"]) == 2
    assert "pip install nltk" in capsys.readouterr().out
    benchmark, items = load("gcg", tmp_path)
    found = metrics(benchmark, items, [answer([LEFT], caption="a box", phrases=["a box"])])
    assert found["METEOR (not available)"] is None
    meteor._wordnet.cache_clear()
    meteor.available_meteor.cache_clear()


@pytest.mark.parametrize(("name", "folder"), [("ref_ytvos", "Annotations/v"), ("mevis@valid", "v")])
def test_what_the_server_takes(name, folder, tmp_path):
    """A picture of each frame, also where nothing was drawn; the same bytes each time."""
    benchmark, items = load(name, tmp_path)
    assert [item.id for item in items] == ["v/0", "v/1"], "videos of `test` are left out"
    assert all(item.reference["target"] is None for item in items)
    responses = answer([LEFT], [LEFT, RIGHT]), answer([], [])
    records = [answer_record(benchmark.task, *pair) for pair in zip(items, responses, strict=True)]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(record) + "\n" for record in records))
    for out in ("one", "two"):
        command = ["eval", "--score-only", str(answers), "--data", str(tmp_path), "--out", str(tmp_path / out)]
        assert main(command) == 0
    path = f"{name.replace('@', '-')}.submission.zip"
    assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    with zipfile.ZipFile(tmp_path / "one" / path) as archive:
        names = [f"{folder}/{number}/{frame}.png" for number in (0, 1) for frame in FRAMES]
        assert archive.namelist() == names
        pictures = [np.asarray(Image.open(archive.open(name))) for name in names]
    assert [picture.dtype for picture in pictures] == [np.uint8] * 4
    for picture, expected in zip(pictures, (LEFT, BOTH, EMPTY, EMPTY), strict=True):
        assert (picture == 255 * expected).all()


def test_pictures_of_frames_that_are_gone(tmp_path, capsys):
    """An answer without masks has the size of the frame, which must be there."""
    benchmark, items = load("ref_ytvos", tmp_path)
    answers = tmp_path / "answers.jsonl"
    records = [answer_record(benchmark.task, item, answer([], [])) for item in items]
    answers.write_text("".join(json.dumps(record) + "\n" for record in records))
    for path in tmp_path.rglob("00005.jpg"):
        path.unlink()
    assert main(["eval", "--score-only", str(answers), "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ref_ytvos/v/0" in line
    assert "00005.jpg" in line
    assert not list((tmp_path / "out").glob("*.zip*"))


def test_masks_of_the_hidden_split_may_be_added(tmp_path):
    write_colours(tmp_path / "ref_ytvos", "valid")
    (benchmark,) = benchmarks.find(["ref_ytvos"])
    items = benchmark.load(tmp_path)
    assert metrics(benchmark, items, [answer([LEFT], [LEFT]), answer([RIGHT], [RIGHT])])["Overall"] == 100


def test_questions_of_videos_ask_for_masks(tmp_path):
    _, items = load("mevis", tmp_path)
    assert items[1].text == " which boxes move? Please respond with a segmentation mask."


@pytest.mark.parametrize(
    ("name", "response", "message"),
    [
        ("refcoco", answer([LEFT[:30]]), "30 x 60 and 40 x 60 pixels; give them at the size"),
        ("refcoco", {"masks": [[LEFT.tolist()]]}, "a mask cannot be read"),
        ("refcoco", {"masks": [[{"size": [HEIGHT, WIDTH], "counts": "no run lengths"}]]}, "a mask cannot be read"),
        ("refcoco", {"masks": [[{"size": [HEIGHT, WIDTH]}]]}, "a mask cannot be read"),
        ("refcoco", {"masks": None}, "the answer has no masks; give"),
        ("refcoco", ["It", "is"], "the answer has no masks; give"),
        ("mevis", answer([LEFT]), "the masks of 1 frames, expected 2"),
        ("mevis", answer([LEFT], [LEFT.T]), "60 x 40 and 40 x 60 pixels"),
        ("revos", answer([LEFT], [LEFT.T]), "60 x 40 and 40 x 60 pixels"),
        ("ref_ytvos", answer([LEFT]), "the masks of 1 frames, expected 2"),
        ("ref_ytvos", answer([LEFT.T], [LEFT.T]), "a mask of 60 x 40 pixels, and"),
        ("gcg", answer([LEFT], phrases=["a", "b"]), "2 phrases and 1 masks"),
        ("gcg", answer([LEFT[:30]], phrases=["a"]), "30 x 60 and 40 x 60 pixels"),
    ],
)
def test_answers_that_do_not_fit(name, response, message, tmp_path, capsys):
    """One line names the answer and what is wrong with it; the exit code is 2."""
    benchmark, items = load(name, tmp_path)
    answers = tmp_path / "answers.jsonl"
    records = [answer_record(benchmark.task, item, response) for item in items]
    answers.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["eval", "--score-only", str(answers), "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert items[0].id in line


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def without_frames(content):
    content["videos"]["v"]["frames"] = []


@pytest.mark.parametrize(
    ("name", "file", "edit", "message"),
    [
        ("ref_ytvos", "meta_expressions/valid/meta_expressions.json", without_frames, "video v has no frames"),
        ("mevis", "valid_u/mask_dict.json", lambda content: content["40"].pop(), "expression 1 of video v has masks"),
        ("mevis", "valid_u/mask_dict.json", lambda content: content.pop("40"), "lacks what it needs (KeyError('40'))"),
        ("revos", "mask_dict_foreground.json", dict.clear, "lacks what it needs"),
        ("revos", "mask_dict_foreground.json", lambda c: c["v"]["masks_rle"].pop(), "video v has masks of other"),
        ("refcoco", "instances.json", lambda content: content["images"].clear(), "lacks what it needs"),
        ("gcg", "annotations/val_test/val_gcg_coco_caption_gt.json", lambda c: c["annotations"].clear(), "lacks what"),
    ],
)
def test_data_that_does_not_fit(name, file, edit, message, tmp_path):
    MASK_CASES[name].write(tmp_path)
    change(tmp_path / name / file, edit)
    with pytest.raises(InputError) as caught:
        benchmarks.find([name])[0].load(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pictures_without_numbers_are_refused(tmp_path):
    MASK_CASES["ref_davis17"].write(tmp_path)
    (path, _) = sorted((tmp_path / "ref_davis17").rglob("*.png"))
    Image.open(path).convert("RGB").save(path)
    with pytest.raises(InputError, match=r"00000\.png: has mode RGB, expected a picture whose colours are numbers"):
        benchmarks.find(["ref_davis17"])[0].load(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"00000\.png: cannot be read"):
        benchmarks.find(["ref_davis17"])[0].load(tmp_path)


def test_files_that_run_code_are_refused(tmp_path):
    write_refcoco(tmp_path / "refcoco")
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match=r"refs\(unc\)\.p: not a pickle of plain values"):
        benchmarks.find(["refcoco"])[0].load(tmp_path)


def test_frames_that_are_tracked_must_be_there(tmp_path):
    """Not only those that the model sees; and an answer belongs to its frames and regions."""
    folder = tmp_path / "mevis" / "valid_u"
    write_mask_table(folder)
    frames = [f"{number:05}" for number in range(8)]
    change(folder / "meta_expressions.json", lambda content: content["videos"]["v"].update(frames=frames))
    write_json(folder / "mask_dict.json", {number: [encode_rle(LEFT)] * 8 for number in ("3", "40")})
    (benchmark,) = benchmarks.find(["mevis"])
    item = benchmark.load(tmp_path)[0]
    assert len(item.media) == 5
    assert [path[-9:] for path in item.missing_media()] == [f"{name}.jpg" for name in frames if name not in FRAMES]
    (before,) = questions_of(benchmark, [item], {})
    change(folder / "meta_expressions.json", lambda content: content["videos"]["v"]["frames"].pop())
    write_json(folder / "mask_dict.json", {number: [encode_rle(LEFT)] * 7 for number in ("3", "40")})
    (after,) = questions_of(benchmark, benchmark.load(tmp_path)[:1], {})
    assert before.hash != after.hash


def test_key_frames_are_spread_in_the_other_mode(tmp_path):
    folder = tmp_path / "mevis" / "valid_u"
    write_mask_table(folder)
    frames = [f"{number:05}" for number in range(9)]
    change(folder / "meta_expressions.json", lambda content: content["videos"]["v"].update(frames=frames))
    write_json(folder / "mask_dict.json", {number: [None] * 9 for number in ("3", "40")})
    (benchmark,) = benchmarks.find(["mevis"])
    seen, hashes = [], set()
    for mode, count in (("sa2va", None), ("sa2va_i", None), ("sa2va_i", 2), ("sa2va", 9), ("sa2va_i", 9)):
        benchmark.mode, benchmark.key_frames = mode, count
        (question, _) = questions_of(benchmark, benchmark.load(tmp_path), {})
        seen.append([int(part["image"][-9:-4]) for part in question.item.media])
        hashes.add(question.hash)
    assert seen == [[0, 1, 2, 3, 4], [0, 2, 4, 6, 8], [0, 8], [*range(9)], [*range(9)]]
    assert len(hashes) == 5


def test_flags_of_tracking_belong_to_videos(tmp_path, capsys):
    command = ["eval", "--model", "nano", "--tasks", "nano/digit", "--mode", "sa2va_i", "--out", str(tmp_path)]
    assert main(command) == 2
    assert "--mode and --key-frames are of benchmarks that track objects" in capsys.readouterr().err


def test_a_model_in_training_is_not_asked():
    with pytest.raises(InputError, match=r"eval\.tasks: mevis takes a Sa2VA"):
        TrainingBenchmarks(EvalConfig(tasks="mevis"))


@pytest.mark.parametrize("name", ["mevis", "region_captions"])
def test_there_is_no_blind_check(name, tmp_path):
    pytest.importorskip("nltk")
    benchmark, items = load(name, tmp_path)
    with pytest.raises(InputError, match=r"the masks of .* belong to theirs"):
        swap_media(benchmark, items)


@pytest.mark.slow
def test_the_command(tmp_path):
    """Asks a model that draws, and one that does not."""
    for name in ("refcoco", "mevis", "region_captions"):
        MASK_CASES[name].write(tmp_path / "data")
    model, out = write_small_sa2va(tmp_path), tmp_path / "out"
    flags = ["--data", str(tmp_path / "data"), "--max-new-tokens", "3", "--max-visual-tokens", "16"]
    tasks = ["--tasks", "refcoco,mevis,region_captions"]
    assert main(["eval", "--model", str(model), *tasks, *flags, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["protocol"]["benchmarks of masks"] == {"image_merge": 2, "max_visual_tokens": 16}
    assert set(results["tasks"]["refcoco"]["metrics"]) == {"cIoU", "gIoU"}
    assert set(results["tasks"]["mevis"]["metrics"]) == {"J", "F", "Overall"}
    other = ["eval", "--model", str(model), "--tasks", "mevis", *flags, "--mode", "sa2va_i", "--key-frames", "1"]
    assert main([*other, "--out", str(out / "i")]) == 0
    protocol = json.loads((out / "i" / "results.json").read_text())["protocol"]
    assert (protocol["mode"], protocol["key_frames"]) == ("sa2va_i", 1)
    records = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert all(len(record["answer"]["masks"]) == 2 for record in records if record["task"] == "mevis")
    assert all(isinstance(record["answer"], str) for record in records if record["task"] == "region_captions")
    answers = [record["answer"] for record in records if record["task"] != "region_captions"]
    drawn = [decode_rle(one) for each in answers for frame in each["masks"] for one in frame]
    assert drawn
    assert {one.shape for one in drawn} == {(HEIGHT, WIDTH)}
    for name, message in (("mevis", "draws no masks"), ("region_captions", "<vp>")):
        command = ["eval", "--model", str(tmp_path / "vl3"), "--tasks", name, *flags, "--out", str(out / name)]
        assert main(command) == 2
        assert message in (out / name / "answers.jsonl").read_text()
