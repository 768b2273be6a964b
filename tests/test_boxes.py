"""`vl3_jax.boxes`: the forms that models really write, and forms that are read as they were written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vl3_jax as vl3
from vl3_jax.boxes import FORMS, Box, draw, format, parse, parse_all

SIZE = (640, 480)
FRACTION = st.floats(0, 1)
# Half a step of each form, as a share of the image, and whether it says what is in a box.
RESOLUTION = {
    "list": (5e-4, False),
    "fractions": (5e-4, False),
    "pixels": (0.5 / 480, False),
    "ref": (5e-4, True),
    "qwen_vl": (5e-4, True),
    "qwen2_vl": (5e-4, True),
    "internvl": (5e-4, True),
    "json": (5e-4, True),
    "json_pixels": (0.5 / 480, True),
    "gemini": (5e-4, True),
    "paligemma": (1 / 1024, True),
    "florence2": (5e-4, True),
    "kosmos2": (1 / 32, True),
    "minigpt_v2": (5e-3, True),
}


def edges(box: Box) -> list[float]:
    return [round(edge, 6) for edge in (box.x0, box.y0, box.x1, box.y1)]


# Text, edges in fractions and label, each as the named model or data set has it.
GOLDEN = [
    # VideoLLaMA3, grounding: thousandths in a list.
    ("[112, 203, 556, 887]", [0.112, 0.203, 0.556, 0.887], ""),
    # nano (data_pipelines/synthetic/formats.py).
    ("<ref>the bag</ref>[[56,42,390,484]]", [0.056, 0.042, 0.39, 0.484], "the bag"),
    # Qwen-VL, README of Qwen-VL-Chat.
    ("<ref>击掌</ref><box>(536,509),(588,602)</box>", [0.536, 0.509, 0.588, 0.602], "击掌"),
    # Qwen2-VL, its technical report.
    (
        "<|object_ref_start|>the eyes on a giraffe<|object_ref_end|><|box_start|>(176,106),(232,160)<|box_end|>",
        [0.176, 0.106, 0.232, 0.16],
        "the eyes on a giraffe",
    ),
    # Qwen3-VL, cookbook of 2D grounding: JSON in thousandths.
    ('```json\n[\n\t{"bbox_2d": [341, 258, 397, 360], "label": "cake"}\n]\n```', [0.341, 0.258, 0.397, 0.36], "cake"),
    # The same as a Python literal, as models often write it.
    ("{'label': 'a \"big\" cake', 'bbox_2d': [341, 258, 397, 360]}", [0.341, 0.258, 0.397, 0.36], 'a "big" cake'),
    # InternVL2, documentation of grounding data.
    ("<ref>a dog</ref><box>[[13, 120, 430, 873]]</box>", [0.013, 0.12, 0.43, 0.873], "a dog"),
    # Gemini, image understanding guide: rows first.
    ('[{"box_2d": [100, 200, 300, 400], "label": "cup"}]', [0.2, 0.1, 0.4, 0.3], "cup"),
    # Shikra, LLaVA-1.5 and VPP-LLaVA: fractions.
    ("The man [0.268,0.372,0.394,0.642] waves.", [0.268, 0.372, 0.394, 0.642], ""),
    ("[0.0, 0.25, 1.0, 0.75]", [0.0, 0.25, 1.0, 0.75], ""),
    # CogVLM: thousandths of three digits.
    ("A boy [[032,186,963,877]].", [0.032, 0.186, 0.963, 0.877], ""),
    # PaliGemma, model card: rows first, in 1024 bins.
    ("<loc0256><loc0128><loc0768><loc0512> cat", [0.125, 0.25, 0.5, 0.75], "cat"),
    # Florence-2, <OD>: the middle of one of 1000 bins.
    ("</s><s>car<loc_52><loc_332><loc_932><loc_774></s>", [0.0525, 0.3325, 0.9325, 0.7745], "car"),
    # Kosmos-2, transformers' documentation, whose entities have these numbers.
    (
        "<grounding><phrase>a snowman</phrase><object><patch_index_0044><patch_index_0863></object>",
        [0.390625, 0.046875, 0.984375, 0.828125],
        "a snowman",
    ),
    # MiniGPT-v2: hundredths.
    ("<p>the red car</p> {<12><34><56><78>}", [0.12, 0.34, 0.56, 0.78], "the red car"),
    # Corners as lists of their own.
    ("from [[100, 200], [300, 400]]", [0.1, 0.2, 0.3, 0.4], ""),
    # The corners in the other order.
    ("(300, 400, 100, 200)", [0.1, 0.2, 0.3, 0.4], ""),
]


@pytest.mark.parametrize(("text", "expected", "label"), GOLDEN)
def test_the_forms_of_models(text, expected, label):
    box = parse(text)
    assert (edges(box), box.label) == (expected, label)


def test_several_boxes_of_one_label_and_of_several():
    # Shikra has several boxes in one bracket, Qwen-VL and InternVL several behind a label, PaliGemma semicolons.
    assert [edges(box)[0] for box in parse_all("[0.1,0.1,0.2,0.2;0.3,0.3,0.4,0.4]")] == [0.1, 0.3]
    text = "<ref>dogs</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box> and a cat at [9, 10, 11, 12]"
    assert [box.label for box in parse_all(text)] == ["dogs", "dogs", ""]
    assert [box.label for box in parse_all("<ref>a</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>")] == ["a", "a"]
    text = "<loc0000><loc0000><loc0512><loc0512> cat ; <loc0100><loc0100><loc0200><loc0200> two dogs 7"
    assert [box.label for box in parse_all(text)] == ["cat", "two dogs 7"]
    text = "car<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7><loc_8>tree<loc_1><loc_2><loc_3><loc_4>"
    assert [box.label for box in parse_all(text)] == ["car", "car", "tree"]


@pytest.mark.parametrize(
    "text", ["", "no box", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "[a, b, c, d]", "<box>(1,2)</box>", "[100, 200, 3000, 4000]"]
)
def test_what_is_malformed_is_no_box(text):
    assert parse_all(text) == []
    with pytest.raises(ValueError, match="found 0"):
        parse(text)


PIECES = [
    "[",
    "]",
    "(",
    ")",
    "{",
    "}",
    ",",
    ";",
    " ",
    "<ref>",
    "</ref>",
    "<box>",
    "<loc0012>",
    "<loc_3>",
    '"bbox_2d": ',
    "'label': ",
    "'",
]


@given(
    st.lists(
        st.one_of(st.sampled_from(PIECES), st.sampled_from(["1", "0.5", "9" * 400, "-7", "a", "\n", "<p>"])),
        max_size=40,
    )
)
def test_any_text_is_read(pieces):
    for unit in (None, *vl3.boxes.UNITS):
        assert all(isinstance(box, Box) for box in parse_all("".join(pieces), unit, SIZE))


def test_the_unit_of_numbers_can_be_given():
    # Qwen2.5-VL writes pixels of the image that it saw.
    text = '{"bbox_2d": [64, 48, 320, 240], "label": "cake"}'
    assert edges(parse(text, unit="pixels", size=SIZE)) == [0.1, 0.1, 0.5, 0.5]
    assert edges(parse("[0, 0, 1, 1]")) == [0, 0, 1, 1]
    assert edges(parse("[0, 0, 1, 1]", unit="thousandths")) == [0, 0, 0.001, 0.001]
    assert edges(parse("[64, 48, 1280, 240]", size=SIZE)) == [0.1, 0.1, 2, 0.5]  # more than thousandths
    with pytest.raises(ValueError, match="size"):
        parse_all(text, unit="pixels")
    with pytest.raises(ValueError, match="percent"):
        parse_all(text, unit="percent")
    with pytest.raises(ValueError, match="found 2"):
        parse("[1, 2, 3, 4] [5, 6, 7, 8]")


@pytest.mark.parametrize("form", FORMS)
@given(
    values=st.lists(st.tuples(FRACTION, FRACTION, FRACTION, FRACTION), min_size=1, max_size=3),
    label=st.sampled_from(["a cat", "das Tier", "猫"]),
)
def test_what_is_written_is_read(form, values, label):
    half_step, has_label = RESOLUTION[form]
    boxes = [Box(*value, label) for value in values]
    unit = {"fractions": "fractions", "pixels": "pixels", "json_pixels": "pixels"}.get(form, "thousandths")
    read = parse_all(format(boxes, form, SIZE), unit, SIZE)
    assert len(read) == len(boxes)
    for one, other in zip(read, boxes, strict=True):
        assert np.allclose(one.xyxy((1, 1)), other.xyxy((1, 1)), rtol=0, atol=half_step + 1e-9)
        assert one.label == (label if has_label else "")


def test_every_form_is_tested_and_errors_name_it():
    assert set(FORMS) == set(RESOLUTION)
    with pytest.raises(ValueError, match="'yolo'"):
        format(Box(0, 0, 1, 1), "yolo")
    with pytest.raises(ValueError, match="size"):
        format(Box(0, 0, 1, 1), "pixels")
    with pytest.raises(ValueError, match="finite"):
        Box(0, 0, float("nan"), 1)


@given(st.tuples(FRACTION, FRACTION, FRACTION, FRACTION))
def test_conversions(values):
    box = Box(*values, "x")
    for back in (Box.from_xyxy(box.xyxy(SIZE), SIZE, "x"), Box.from_xywh(box.xywh(SIZE), SIZE, "x")):
        assert np.allclose(back.xyxy((1, 1)), box.xyxy((1, 1)))
        assert back.label == "x"
    assert box.iou(box) == pytest.approx(1) or box.area == 0


def test_iou():
    assert Box(0, 0, 0.5, 1).iou(Box(0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)
    assert Box(0, 0, 0.1, 0.1).iou(Box(0.5, 0.5, 1, 1)) == 0
    assert Box(-1, 0, 2, 1).clipped() == Box(0, 0, 1, 1)


def test_drawn_boxes_are_where_they_belong():
    image = np.zeros((100, 200, 3), np.uint8)
    drawn = draw(image, [vl3.boxes.Box(0.25, 0.4, 0.75, 0.9), Box(0.9, 0, 3, 0.1, "a long label")])
    assert drawn.size == (200, 100)
    pixels = np.asarray(drawn)
    assert not image.any()  # the image itself stays
    red = (pixels == pixels[60, 50]).all(-1) & pixels.any(-1)
    rows, columns = np.nonzero(red)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (50, 40, 150, 90)
    assert not pixels[60, 100].any()  # only the outline
    assert np.asarray(draw(Image.new("L", (20, 20)), Box(0, 0, 1, 1), width=3))[2, 10].any()
