"""References, checked against the rendered pixels: what differs from the background, and in which frames."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.synthetic import parsing
from data_pipelines.synthetic.formats import box_answer, position_of, position_phrase, span_answer, thousandths
from data_pipelines.synthetic.registry import examples
from data_pipelines.synthetic.sprites import shape_mask
from data_pipelines.synthetic.vocabulary import COLOURS, DIRECTIONS, POSITIONS, SHAPES, with_article

COUNT = 40
VISIBLE = 12  # grey levels


def box_of(changed):
    """Returns the bounding box x0, y0, x1, y1 of a [h, w] bool mask, None if the mask is empty."""
    if not changed.any():
        return None
    rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def difference(image, other, visible=VISIBLE):
    return np.abs(image.astype(int) - other.astype(int)).max(axis=-1) > visible


def object_masks(scene):
    """Returns the mask of each object, rendered alone."""
    background = scene.background.render(scene.height, scene.width)
    return [difference(dataclasses.replace(scene, objects=(placed,)).pixels(), background) for placed in scene.objects]


def frame_masks(video, track):
    """Returns the mask of an object in each frame, rendered alone."""
    frames = dataclasses.replace(video, tracks=(track,), noise_seed=None).pixels()
    return [difference(frame, video.background.render(video.height, video.width)) for frame in frames]


@pytest.mark.parametrize(
    "task", ["digit", "fashion", "shape", "count", "ocr", "box", "box_of_two", "colour_of", "pair"]
)
def test_objects_are_where_the_reference_says(task):
    for sample in examples(task, "test", 0, COUNT):
        for scene, facts in zip(sample.media, sample.reference["media"], strict=True):
            assert scene.pixels().shape == (*facts["size"], 3)
            for mask, fact in zip(object_masks(scene), facts["objects"], strict=True):
                assert box_of(mask) == pytest.approx(fact["box"], abs=3)
                assert fact["box"][0] >= 0
                assert fact["box"][1] >= 0
                assert fact["box"][2] <= scene.width
                assert fact["box"][3] <= scene.height


def test_naming_and_reading():
    for task in ("digit", "fashion", "shape", "ocr"):
        for sample in examples(task, "train", 0, COUNT):
            objects = sorted(sample.reference["media"][0]["objects"], key=lambda fact: fact["box"][0])
            assert sample.answer == "".join(fact["name"] for fact in objects)
            if task in ("digit", "ocr"):  # large enough to be read at 14 pixels a patch
                assert all(fact["box"][3] - fact["box"][1] >= 20 for fact in objects)


def test_pairs():
    answers = []
    for sample in examples("pair", "test", 0, COUNT):
        assert sample.answer == " and ".join(facts["objects"][0]["name"] for facts in sample.reference["media"])
    for sample in examples("same", "test", 0, 200):
        first, second = (facts["objects"][0] for facts in sample.reference["media"])
        assert sample.answer == ("yes" if first["name"] == second["name"] else "no")
        answers.append(sample.answer)
    assert 70 < answers.count("yes") < 130


def test_count():
    for sample in examples("count", "test", 0, 100):
        (scene,) = sample.media
        masks = object_masks(scene)
        assert len(masks) == int(sample.answer)
        assert all(mask.any() for mask in masks)
        assert not (np.sum(masks, axis=0) > 1).any()  # apart from each other


def test_position():
    for sample in examples("position", "test", 0, 100):
        (scene,) = sample.media
        x0, y0, x1, y1 = box_of(object_masks(scene)[0])
        middle = ((x0 + x1) / 2 / scene.width * 3, (y0 + y1) / 2 / scene.height * 3)
        assert position_of((x0, y0, x1, y1), scene.height, scene.width) == sample.answer
        assert all(0.02 < coordinate % 1 < 0.98 for coordinate in middle)


@pytest.mark.parametrize("task", ["box", "box_of_two", "talk", "talk_of_two"])
def test_boxes(task):
    for sample in examples(task, "test", 1, COUNT):
        (scene,) = sample.media
        for question, answer in sample.turns:
            if "<ref>" not in answer:
                continue
            (box,) = parsing.parse_boxes(answer)
            name = answer.split("<ref>the ")[1].split("</ref>")[0]
            assert f"the {name}" in question
            (rank,) = [rank for rank, placed in enumerate(scene.objects) if placed.sprite.name == name]
            sides = np.array([scene.width, scene.height] * 2) / 1000
            assert box_of(object_masks(scene)[rank]) == pytest.approx((np.array(box) * sides).tolist(), abs=4)
            assert all(value == int(value) and 0 <= value <= 1000 for value in box)


@pytest.mark.parametrize("task", ["colour", "colour_of"])
def test_colours(task):
    for sample in examples(task, "test", 0, 60):
        (scene,) = sample.media
        (asked,) = [
            placed
            for placed in scene.objects
            if placed.sprite.name == sample.reference.get("asked", placed.sprite.name)
        ]
        intensity = asked.sprite.intensity
        x, y = asked.x, asked.y
        pixels = scene.pixels()[y : y + asked.sprite.height, x : x + asked.sprite.width][intensity > 200].astype(float)
        if len(pixels):
            shade = pixels.mean(axis=0) / np.linalg.norm(pixels.mean(axis=0))
            nearest = max(COLOURS, key=lambda name: shade @ np.array(COLOURS[name]) / np.linalg.norm(COLOURS[name]))
            assert nearest == sample.answer


def test_captions():
    for sample in examples("caption", "test", 0, COUNT):
        (fact,) = sample.reference["media"][0]["objects"]
        position = position_of(fact["box"], *sample.reference["media"][0]["size"])
        expected = {fact["name"].lower(), f"{fact['colour']} {fact['name']}".lower(), f"at {position}"}
        assert parsing.parse_attributes(sample.answer) == expected
    for sample in examples("caption_of_two", "test", 0, COUNT):
        objects = sample.reference["media"][0]["objects"]
        assert [fact["name"] in sample.answer for fact in objects] == [True, True]
        assert sample.answer.index(objects[0]["colour"]) < sample.answer.index(objects[1]["colour"])
        (x, y), (later_x, later_y) = (fact["box"][:2] for fact in objects)
        assert later_x > x or later_y > y
        assert len(parsing.parse_attributes(sample.answer)) == 4


def test_motion():
    for sample in examples("motion", "test", 0, COUNT):
        (video,) = sample.media
        boxes = [box_of(mask) for mask in frame_masks(video, video.tracks[0])]
        moved = np.diff([[(x0 + x1) / 2, (y0 + y1) / 2] for x0, y0, x1, y1 in boxes], axis=0).sum(axis=0)
        expected = np.array(DIRECTIONS[sample.answer])
        assert (np.sign(moved) * (np.abs(moved) > 2) == expected).all()
        assert np.abs(moved).max() > 10


@pytest.mark.parametrize("task", ["when", "when_of_two"])
def test_times(task):
    for sample in examples(task, "test", 0, COUNT):
        (video,) = sample.media
        (track,) = [track for track in video.tracks if track.sprite.name == sample.reference["asked"]]
        visible = [frame for frame, mask in enumerate(frame_masks(video, track)) if mask.any()]
        assert visible == list(range(visible[0], visible[-1] + 1))
        assert sample.reference["span"] == [visible[0], visible[-1] + 1]
        assert parsing.parse_spans(sample.answer) == [tuple(sample.reference["span"])]
        assert len(visible) < video.num_frames
        assert video.times == [float(frame) for frame in range(video.num_frames)]


def test_order():
    for sample in examples("order", "test", 0, COUNT):
        (video,) = sample.media
        starts = sorted(
            (next(frame for frame, corner in enumerate(track.corners) if corner), track.sprite.name)
            for track in video.tracks
        )
        assert len({frame for frame, _ in starts}) == len(starts)
        assert sample.answer == starts[0 if "first" in sample.question else -1][1]


def test_noise_is_faint():
    noisy = [sample.video for sample in examples("motion", "train", 0, 60) if sample.video.noise_seed is not None]
    assert 8 < len(noisy) < 32
    for video in noisy[:5]:
        frames, clean = video.pixels(), dataclasses.replace(video, noise_seed=None).pixels()
        assert 0 < np.abs(frames.astype(int) - clean.astype(int)).max() <= 6


def test_shapes_fill_their_mask():
    for name in SHAPES:
        shape = shape_mask(name)
        assert shape.max() == 255
        assert box_of(shape > 60) == pytest.approx((0, 0, 96, 96), abs=3)


def test_formats():
    assert thousandths((14, 28, 56, 84), 84, 56) == [250, 333, 1000, 1000]
    assert box_answer("ankle boot", [0, 5, 250, 1000]) == "<ref>the ankle boot</ref>[[0,5,250,1000]]"
    assert span_answer(3, 7) == "3.0-7.0 s"
    assert [position_of((x, y, x, y), 90, 30) for y in (15, 45, 75) for x in (5, 15, 25)] == list(POSITIONS)
    assert [position_phrase(position) for position in ("top left", "left", "middle")] == [
        "at the top left",
        "on the left",
        "in the middle",
    ]
    words = ["8", "orange bag", "7", "blue trousers"]
    assert [with_article(word) for word in words] == ["an 8", "an orange bag", "a 7", "blue trousers"]
