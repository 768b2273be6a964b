"""Made-up data of the benchmarks of masks in the layouts of their published files, and answers to each question.

Each writer names where the fields are taken from.
"""

import dataclasses
import json
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from support.benchmark_items import Case
from vl3_jax.processing.mask_files import encode_rle

HEIGHT, WIDTH = 40, 60


def mask(left: int, right: int) -> np.ndarray:
    """Returns a mask of rows 10 to 29 of these columns."""
    drawn = np.zeros((HEIGHT, WIDTH), bool)
    drawn[10:30, left:right] = True
    return drawn


LEFT, RIGHT = mask(10, 20), mask(30, 50)  # of 200 and 400 pixels


def answer(*frames: list[np.ndarray], **values: Any) -> dict[str, Any]:
    """Returns an answer with these masks, by frame and object."""
    masks = [[encode_rle(one) for one in frame] for frame in frames]
    return {"text": "", "phrases": [None] * len(frames[0]), "masks": masks, **values}


@dataclasses.dataclass(frozen=True)
class MaskCase(Case):
    """Items of a benchmark of masks."""

    writer: Callable[[pathlib.Path], None]

    def write(self, root: pathlib.Path) -> None:
        self.writer(root / self.benchmark)


def write_image(path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(path)


def write_json(path: pathlib.Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_refcoco(folder: pathlib.Path, by: str = "unc", phrases: int = 2) -> None:
    """Writes two objects of one image, as a polygon and as run lengths, with several phrases and one.

    Fields: refer.py of github.com/lichengunc/refer.
    """
    write_image(folder / "images" / "a.jpg")
    polygon = [[10, 10, 20, 10, 20, 30, 10, 30]]
    shapes = [polygon, {"size": [HEIGHT, WIDTH], "counts": encode_rle(RIGHT)["counts"]}]
    instances = {
        "images": [{"id": 7, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"id": number, "segmentation": shape} for number, shape in enumerate(shapes)],
    }
    write_json(folder / "instances.json", instances)
    sentences = [["left box", *(f"box {number}" for number in range(1, phrases))], ["right box"]]
    refs = [
        {
            "ref_id": number,
            "ann_id": number,
            "image_id": 7,
            "split": "val",
            "sentences": [{"sent_id": 1000 * number + place, "sent": text} for place, text in enumerate(texts)],
        }
        for number, texts in enumerate(sentences)
    ]
    refs.append({**refs[0], "split": "testA"})
    (folder / f"refs({by}).p").write_bytes(pickle.dumps(refs))


FRAMES = ["00000", "00005"]
EXPRESSIONS = {
    "0": {"exp": "the left box", "anno_id": [3], "obj_id": [0], "type_id": 0},
    "1": {"exp": "which boxes move?", "anno_id": [3, 40], "obj_id": [0, 7], "type_id": 1},
}


def write_mask_table(
    folder: pathlib.Path, annotations: str = "meta_expressions.json", images: str = "JPEGImages", hidden: bool = False
) -> None:
    """Writes a video of two frames with two objects, of which the second is in one frame only.

    Fields: README.md and tools/eval_mevis.py of github.com/henghuiding/MeViS, tools/eval_revos.py of
    github.com/cilinyan/VISA, tools/eval/eval_ref_sav.py of github.com/bytedance/Sa2VA.
    """
    names = ("exp",) if hidden else ("exp", "anno_id", "obj_id", "type_id")
    expressions = {number: {name: entry[name] for name in names} for number, entry in EXPRESSIONS.items()}
    entry = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "expressions": expressions}
    write_json(folder / annotations, {"videos": {"v": entry}})
    if not hidden:
        left, right = encode_rle(LEFT), encode_rle(RIGHT)
        write_json(folder / "mask_dict.json", {"3": [left, left], "40": [None, right]})
    for frame in FRAMES:
        write_image(folder / images / "v" / f"{frame}.jpg")


def write_revos(folder: pathlib.Path) -> None:
    """Fields: tools/generate_foreground_mask.py of github.com/cilinyan/VISA."""
    write_mask_table(folder, "meta_expressions_valid_.json", "")
    both = encode_rle(LEFT | RIGHT)
    write_json(folder / "mask_dict_foreground.json", {"v": {"masks_rle": [both, both], "foreground_ratio": [0.2, 0.2]}})


def write_colours(folder: pathlib.Path, split: str, hidden: bool = False) -> None:
    """Writes a video of two frames with objects 1 and 4, and expressions for both.

    Fields: datasets/ytvos.py, inference_ytvos.py and tools/data/convert_davis_to_ytvos.py of
    github.com/wjn922/ReferFormer.
    """
    numbers = {"0": {}, "1": {}} if hidden else {"0": {"obj_id": "1"}, "1": {"obj_id": "4"}}
    entry = {"frames": FRAMES, "expressions": {name: {"exp": "a box", **number} for name, number in numbers.items()}}
    videos = {"v": entry, "w": entry} if hidden else {"v": entry}
    write_json(folder / "meta_expressions" / split / "meta_expressions.json", {"videos": videos})
    if hidden:
        write_json(folder / "meta_expressions" / "test" / "meta_expressions.json", {"videos": {"w": entry}})
    for frame in FRAMES:
        write_image(folder / split / "JPEGImages" / "v" / f"{frame}.jpg")
        if not hidden:
            path = folder / split / "Annotations" / "v" / f"{frame}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colours = Image.fromarray((LEFT + 4 * RIGHT).astype(np.uint8), mode="P")
            colours.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128])
            colours.save(path)


def write_gcg(folder: pathlib.Path) -> None:
    """Fields: eval/gcg/evaluate.py of github.com/mbzuai-oryx/groundingLMM."""
    images = [{"id": "sa_1", "height": HEIGHT, "width": WIDTH}]
    caption = {"id": 1, "image_id": "sa_1", "caption": "A box near two bars.", "labels": ["A box", "two bars"]}
    shapes = [{"id": n, "image_id": "sa_1", "segmentation": encode_rle(m)} for n, m in enumerate((LEFT, RIGHT))]
    for name, annotations in (("caption", [caption]), ("mask", shapes)):
        path = folder / "annotations" / "val_test" / f"val_gcg_coco_{name}_gt.json"
        write_json(path, {"images": images, "annotations": annotations})
    write_image(folder / "GranDf_HA_images" / "val_test" / "sa_1.jpg")


def write_region_captions(folder: pathlib.Path) -> None:
    """Fields: projects/sa2va/evaluation/region_cap_refcocog_eval.py of github.com/bytedance/Sa2VA."""
    image = {"file_name": "a.jpg", "height": HEIGHT, "width": WIDTH, "original_id": 7}
    captions = {9: "a red box", 11: "the bar on the right"}
    images = [{**image, "id": number, "caption": caption} for number, caption in captions.items()]
    polygon = [[10, 10, 20, 10, 20, 30, 10, 30]]
    shapes = [{"id": 9, "image_id": 9, "segmentation": polygon}]
    shapes.append({"id": 11, "image_id": 11, "segmentation": encode_rle(RIGHT)})
    content = {"images": images, "annotations": shapes, "categories": []}
    write_json(folder / "finetune_refcocog_val_with_mask.json", content)
    write_image(folder / "images" / "a.jpg")


_PHRASES = [answer([LEFT]), answer([]), answer([RIGHT])]  # intersections of 600 pixels, unions of 800
_LEFT_IN_BOTH, _NOTHING = answer([LEFT], [LEFT]), answer([], [])
_VIDEO = [_LEFT_IN_BOTH, _NOTHING]
_CASES = [
    MaskCase("refcoco", [], _PHRASES, {"RefCOCO": 75.0}, write_refcoco),
    MaskCase("refcoco+", [], _PHRASES, {"RefCOCO+": 75.0}, write_refcoco),
    MaskCase("refcocog", [], _PHRASES, {"RefCOCOg": 75.0}, lambda folder: write_refcoco(folder, "umd")),
    MaskCase("mevis", [], _VIDEO, {"MeViS": 50.0}, lambda folder: write_mask_table(folder / "valid_u")),
    MaskCase("mevis@valid", [], _VIDEO, {}, lambda folder: write_mask_table(folder / "valid", hidden=True)),
    MaskCase("ref_ytvos", [], _VIDEO, {}, lambda folder: write_colours(folder, "valid", hidden=True)),
    MaskCase("ref_ytvos@train", [], _VIDEO, {"Ref-YTVOS": 50.0}, lambda folder: write_colours(folder, "train")),
    MaskCase("ref_davis17", [], _VIDEO, {"Ref-DAVIS17": 50.0}, lambda folder: write_colours(folder, "valid")),
    MaskCase("revos", [], _VIDEO, {"ReVOS": 50.0}, write_revos),
    MaskCase(
        "ref_sav",
        [],
        _VIDEO,
        {"Ref-SAV": 50.0},
        lambda folder: write_mask_table(folder, "meta_expressions_valid.json", "videos"),
    ),
    MaskCase(
        "gcg",
        [],
        [answer([mask(10, 18), mask(0, 5)], caption="A box.", phrases=["a box", "a bar"])],
        {"GCG": 100 * 51 / 101},  # the precision is 1 up to a recall of one half
        write_gcg,
    ),
    # Headline: only with all stages of METEOR, see the test of this benchmark.
    MaskCase("region_captions", [], ["Region1 is a red box.", "zebra"], {}, write_region_captions),
]
MASK_CASES = {case.task: case for case in _CASES}
