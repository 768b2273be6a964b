"""Benchmarks of masks on made-up folders in their real layouts: items, prompts, scores, and the command."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from support.sa2va_models import write_small_sa2va
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError
from vl3_jax.evaluation import benchmarks
from vl3_jax.evaluation.benchmark import ScoredAnswer, Scoring
from vl3_jax.processing.mask_files import decode_rle, encode_rle

HEIGHT, WIDTH = 40, 60


def mask(left: int, right: int) -> np.ndarray:
    drawn = np.zeros((HEIGHT, WIDTH), bool)
    drawn[10:30, left:right] = True
    return drawn


def write_picture(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(path)


def write_json(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_refcoco(root, name="refcoco", by="unc"):
    """Writes two objects of one image, as a polygon and as run lengths, with three phrases."""
    folder = root / name
    write_picture(folder / "images" / "a.jpg")
    polygon = [[10, 10, 20, 10, 20, 30, 10, 30]]
    shapes = [polygon, {"size": [HEIGHT, WIDTH], "counts": encode_rle(mask(30, 50))["counts"]}]
    instances = {
        "images": [{"id": 7, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"id": number, "segmentation": shape} for number, shape in enumerate(shapes)],
    }
    write_json(folder / "instances.json", instances)
    sentences = [["left box", "the box"], ["right box"]]
    refs = [
        {
            "ref_id": number,
            "ann_id": number,
            "image_id": 7,
            "split": "val",
            "sentences": [{"sent_id": 10 * number + place, "sent": text} for place, text in enumerate(texts)],
        }
        for number, texts in enumerate(sentences)
    ]
    refs.append({**refs[0], "split": "testA"})
    (folder / f"refs({by}).p").write_bytes(pickle.dumps(refs))


VIDEO = {"frames": ["00000", "00005"]}
EXPRESSIONS = {
    "0": {"exp": "the left box", "anno_id": [3], "obj_id": [0], "type_id": 0},
    "1": {"exp": "which boxes move?", "anno_id": [3, 4], "obj_id": [0, 1], "type_id": 1},
}


def write_masks_by_number(folder, metadata="meta_expressions.json"):
    """Writes a video of two frames with two objects, of which the second is in one frame only."""
    write_json(folder / metadata, {"videos": {"v": {**VIDEO, "expressions": EXPRESSIONS}}})
    left, right = encode_rle(mask(10, 20)), encode_rle(mask(30, 50))
    write_json(folder / "mask_dict.json", {"3": [left, left], "4": [None, right]})
    for frame in VIDEO["frames"]:
        write_picture(folder / "JPEGImages" / "v" / f"{frame}.jpg")


def write_davis(root):
    folder = root / "ref_davis17"
    expressions = {name: {"exp": "a box", "obj_id": number} for name, number in (("0", "1"), ("1", "2"))}
    path = folder / "meta_expressions" / "valid" / "meta_expressions.json"
    write_json(path, {"videos": {"v": {**VIDEO, "expressions": expressions}}})
    for frame in VIDEO["frames"]:
        write_picture(folder / "valid" / "JPEGImages" / "v" / f"{frame}.jpg")
        picture = folder / "valid" / "Annotations" / "v" / f"{frame}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        colours = Image.fromarray((mask(10, 20) + 2 * mask(30, 50)).astype(np.uint8), mode="P")
        colours.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        colours.save(picture)


def write_revos(root):
    write_masks_by_number(root / "revos", "meta_expressions_valid_.json")
    both = encode_rle(mask(10, 20) | mask(30, 50))
    write_json(root / "revos" / "mask_dict_foreground.json", {"v": {"masks_rle": [both, both]}})


def write_gcg(root):
    folder = root / "gcg"
    images = [{"id": "sa_1", "height": HEIGHT, "width": WIDTH}]
    caption = {"image_id": "sa_1", "caption": "A box near two bars.", "labels": ["A box", "two bars"]}
    shapes = [{"image_id": "sa_1", "segmentation": encode_rle(each)} for each in (mask(10, 20), mask(30, 50))]
    for name, annotations in (("caption", [caption]), ("mask", shapes)):
        path = folder / "annotations" / "val_test" / f"val_gcg_coco_{name}_gt.json"
        write_json(path, {"images": images, "annotations": annotations})
    write_picture(folder / "GranDf_HA_images" / "val_test" / "sa_1.jpg")


WRITERS = {
    "refcoco": write_refcoco,
    "refcoco+": lambda root: write_refcoco(root, "refcoco+"),
    "refcocog": lambda root: write_refcoco(root, "refcocog", "umd"),
    "mevis": lambda root: write_masks_by_number(root / "mevis" / "valid_u"),
    "revos": write_revos,
    "ref_sav": lambda root: write_masks_by_number(root / "ref_sav", "meta_expressions_valid.json"),
    "ref_davis17": write_davis,
    "gcg": write_gcg,
}


def load(name, root):
    WRITERS[name](root)
    (benchmark,) = benchmarks.find([name])
    return benchmark, benchmark.load(root)


def answer(*frames: list[np.ndarray]) -> dict:
    return {"text": "", "phrases": [], "masks": [[encode_rle(one) for one in frame] for frame in frames]}


def metrics(benchmark, items, responses) -> dict:
    pairs = zip(items, responses, strict=True)
    verdicts = [(benchmark.score(response, item.reference, Scoring()), item) for item, response in pairs]
    return benchmark.metrics([ScoredAnswer(verdict, item.reference) for verdict, item in verdicts])


def test_every_benchmark_of_masks_is_tried():
    assert set(WRITERS) == set(benchmarks.MASK_BENCHMARKS)
    assert [benchmark.name for benchmark in benchmarks.find(["masks"])] == list(WRITERS)


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_phrases_of_images(name, tmp_path):
    benchmark, items = load(name, tmp_path)
    texts = [f" Please segment {phrase} in this image." for phrase in ("left box", "the box", "right box")]
    assert [item.text for item in items] == texts
    assert not any(item.missing_media() for item in items)
    left = decode_rle(items[0].reference["target"])
    assert (left == mask(10, 20)).all()
    right = answer([left]), answer([mask(10, 15), mask(15, 20)]), answer([mask(30, 50)])
    assert metrics(benchmark, items, right) == {"cIoU": 100, "gIoU": 100}
    wrong = answer([mask(10, 15)]), answer([]), answer([mask(30, 50)])
    found = metrics(benchmark, items, wrong)
    assert found["cIoU"] == pytest.approx(100 * (100 + 400) / (200 + 200 + 400))
    assert found["gIoU"] == pytest.approx(100 * 1.5 / 3)
    assert benchmark.score(wrong[1], items[1].reference, Scoring()).unparsed == "no mask"


@pytest.mark.parametrize("name", ["mevis", "revos", "ref_sav", "ref_davis17"])
def test_expressions_of_videos(name, tmp_path):
    benchmark, items = load(name, tmp_path)
    first, second = items
    assert [first.id, second.id] == ["v/0", "v/1"]
    assert [len(item.media) for item in items] == [2, 2]
    assert len(first.frames) == 2
    assert first.text.startswith("Please segment ")
    whole = [mask(10, 20), mask(10, 20)]
    other = [mask(30, 50)] * 2 if name == "ref_davis17" else [mask(10, 20), mask(10, 20) | mask(30, 50)]
    right = answer(*([each] for each in whole)), answer(*([each] for each in other))
    found = metrics(benchmark, items, right)
    assert (found["J"], found["F"], found["Overall"]) == (100, 100, 100)
    found = metrics(benchmark, items, (right[0], answer([], [])))
    assert (found["J"], found["F"], found["Overall"]) == (50, 50, 50)
    groups = {"ref_sav": ("long", "short"), "revos": ("referring", "reasoning")}.get(name, ())
    assert [found[group]["J&F"] for group in groups] == [100, 0][: len(groups)]
    assert len(found) == 3 + len(groups)


def test_robustness(tmp_path):
    """What is drawn wrongly, over all objects of the video: 200 of 600 pixels in one frame, none in the other."""
    benchmark, (first, _) = load("revos", tmp_path)
    response = answer([mask(10, 20), mask(30, 40)], [mask(10, 20)])
    verdict = benchmark.score(response, first.reference, Scoring())
    assert verdict.parsed["R"] == pytest.approx((2 / 3 + 1) / 2)
    found = benchmark.metrics([ScoredAnswer(verdict, first.reference)])
    assert found["referring"]["R"] == pytest.approx(100 * 5 / 6)


def test_grounded_captions(tmp_path):
    benchmark, (item,) = load("gcg", tmp_path)
    assert item.text.startswith("Could you please give me a brief description")
    assert not item.missing_media()
    right = {"caption": "A box near two bars.", "phrases": ["the box", "bars"]}
    masks = answer([mask(10, 20), mask(30, 50)])["masks"]
    found = metrics(benchmark, [item], [{**right, "masks": masks}])
    assert (found["mIoU"], found["Recall (lemmas)"], found["AP50"]) == (100, 100, 100)
    swapped = metrics(benchmark, [item], [{**right, "masks": [masks[0][::-1]]}])
    assert (swapped["mIoU"], swapped["Recall (lemmas)"]) == (100, 0)
    nothing = metrics(benchmark, [item], [{"caption": "", "phrases": [], "masks": [[]]}])
    assert {name: value for name, value in nothing.items() if not name.startswith("METEOR")} == {
        "mIoU": 0,
        "Recall (lemmas)": 0,
        "AP50": 0,
    }
    benchmark.similarity = lambda first, second: np.ones((len(first), len(second)))
    assert metrics(benchmark, [item], [{**right, "masks": [masks[0][::-1]]}])["Recall"] == 100


def test_questions_of_videos_ask_for_masks(tmp_path):
    _, items = load("mevis", tmp_path)
    assert items[1].text == " which boxes move? Please respond with a segmentation mask."


def test_files_that_run_code_are_refused(tmp_path):
    write_refcoco(tmp_path)
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match=r"refs\(unc\)\.p: not a pickle of plain values"):
        benchmarks.find(["refcoco"])[0].load(tmp_path)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    """Asks a model that draws, and one that does not."""
    for name in ("refcoco", "mevis"):
        WRITERS[name](tmp_path / "data")
    model, out = write_small_sa2va(tmp_path), tmp_path / "out"
    flags = ["--data", str(tmp_path / "data"), "--max-new-tokens", "3", "--max-visual-tokens", "16"]
    tasks = ["--tasks", "refcoco,mevis"]
    assert main(["eval", "--model", str(model), *tasks, *flags, "--out", str(out)]) == 0
    tasks_found = json.loads((out / "results.json").read_text())["tasks"]
    assert set(tasks_found["refcoco"]["metrics"]) == {"cIoU", "gIoU"}
    assert set(tasks_found["mevis"]["metrics"]) == {"J", "F", "Overall"}
    records = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    videos = [record for record in records if record["task"] == "mevis"]
    assert all(len(record["answer"]["masks"]) == 2 for record in videos)
    drawn = [decode_rle(one) for record in records for frame in record["answer"]["masks"] for one in frame]
    assert drawn
    assert {one.shape for one in drawn} == {(HEIGHT, WIDTH)}
    assert main(["eval", "--model", str(tmp_path / "vl3"), "--tasks", "mevis", *flags, "--out", str(out / "x")]) != 0
    assert "draws no masks" in (out / "x" / "answers.jsonl").read_text()
