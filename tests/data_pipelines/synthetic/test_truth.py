"""Answers, checked against the drawn pixels: what differs from the empty ground, and in which frames."""

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
    """x0, y0, x1, y1 of a [h, w] bool mask; None if nothing in it."""
    if not changed.any():
        return None
    rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def difference(one, other, visible=VISIBLE):
    return np.abs(one.astype(int) - other.astype(int)).max(axis=-1) > visible


def seen(scene):
    """Mask of each thing, drawn alone."""
    empty = scene.background.draw(scene.height, scene.width)
    return [difference(dataclasses.replace(scene, placed=(one,)).pixels(), empty) for one in scene.placed]


def frames_of(clip, track):
    """Mask of one thing in each frame, drawn alone."""
    film = dataclasses.replace(clip, tracks=(track,), noise_seed=None).pixels()
    return [difference(frame, clip.background.draw(clip.height, clip.width)) for frame in film]


@pytest.mark.parametrize(
    "task", ["digit", "fashion", "shape", "count", "ocr", "box", "box_of_two", "colour_of", "pair"]
)
def test_things_are_where_the_truth_says(task):
    for one in examples(task, "test", 0, COUNT):
        for scene, facts in zip(one.media, one.truth["media"], strict=True):
            shown = scene.pixels()
            assert shown.shape == (*facts["size"], 3)
            for mask, sprite in zip(seen(scene), facts["objects"], strict=True):
                assert box_of(mask) == pytest.approx(sprite["box"], abs=3)
                assert sprite["box"][0] >= 0
                assert sprite["box"][1] >= 0
                assert sprite["box"][2] <= scene.width
                assert sprite["box"][3] <= scene.height


def test_naming_and_reading():
    for task in ("digit", "fashion", "shape", "ocr"):
        for one in examples(task, "train", 0, COUNT):
            objects = sorted(one.truth["media"][0]["objects"], key=lambda sprite: sprite["box"][0])
            assert one.answer == "".join(sprite["name"] for sprite in objects)
            if task in ("digit", "ocr"):  # large enough to be read at 14 pixels a patch
                assert all(sprite["box"][3] - sprite["box"][1] >= 20 for sprite in objects)


def test_pairs():
    answers = []
    for one in examples("pair", "test", 0, COUNT):
        assert one.answer == " and ".join(facts["objects"][0]["name"] for facts in one.truth["media"])
    for one in examples("same", "test", 0, 200):
        first, second = (facts["objects"][0] for facts in one.truth["media"])
        assert one.answer == ("yes" if first["name"] == second["name"] else "no")
        answers.append(one.answer)
    assert 70 < answers.count("yes") < 130


def test_count():
    for one in examples("count", "test", 0, 100):
        (scene,) = one.media
        masks = seen(scene)
        assert len(masks) == int(one.answer)
        assert all(mask.any() for mask in masks)
        assert not (np.sum(masks, axis=0) > 1).any()  # apart from each other


def test_position():
    for one in examples("position", "test", 0, 100):
        (scene,) = one.media
        x0, y0, x1, y1 = box_of(seen(scene)[0])
        middle = ((x0 + x1) / 2 / scene.width * 3, (y0 + y1) / 2 / scene.height * 3)
        assert position_of((x0, y0, x1, y1), scene.height, scene.width) == one.answer
        assert all(0.02 < coordinate % 1 < 0.98 for coordinate in middle)


@pytest.mark.parametrize("task", ["box", "box_of_two", "talk", "talk_of_two"])
def test_boxes(task):
    for one in examples(task, "test", 1, COUNT):
        (scene,) = one.media
        for question, answer in one.turns:
            if "<ref>" not in answer:
                continue
            (box,) = parsing.parse_boxes(answer)
            name = answer.split("<ref>the ")[1].split("</ref>")[0]
            assert f"the {name}" in question
            (rank,) = [rank for rank, placed in enumerate(scene.placed) if placed.sprite.name == name]
            sides = np.array([scene.width, scene.height] * 2) / 1000
            assert box_of(seen(scene)[rank]) == pytest.approx((np.array(box) * sides).tolist(), abs=4)
            assert all(value == int(value) and 0 <= value <= 1000 for value in box)


@pytest.mark.parametrize("task", ["colour", "colour_of"])
def test_colours(task):
    for one in examples(task, "test", 0, 60):
        (scene,) = one.media
        (asked,) = [p for p in scene.placed if p.sprite.name == one.truth.get("asked", p.sprite.name)]
        light = asked.sprite.light
        x, y = asked.x, asked.y
        pixels = scene.pixels()[y : y + asked.sprite.height, x : x + asked.sprite.width][light > 200].astype(float)
        if len(pixels):
            shade = pixels.mean(axis=0) / np.linalg.norm(pixels.mean(axis=0))
            nearest = max(COLOURS, key=lambda name: shade @ np.array(COLOURS[name]) / np.linalg.norm(COLOURS[name]))
            assert nearest == one.answer


def test_captions():
    for one in examples("caption", "test", 0, COUNT):
        (sprite,) = one.truth["media"][0]["objects"]
        place = position_of(sprite["box"], *one.truth["media"][0]["size"])
        wanted = {sprite["name"].lower(), f"{sprite['colour']} {sprite['name']}".lower(), f"at {place}"}
        assert parsing.parse_attributes(one.answer) == wanted
    for one in examples("caption_of_two", "test", 0, COUNT):
        objects = one.truth["media"][0]["objects"]
        assert [sprite["name"] in one.answer for sprite in objects] == [True, True]
        assert one.answer.index(objects[0]["colour"]) < one.answer.index(objects[1]["colour"])
        (x, y), (later_x, later_y) = (sprite["box"][:2] for sprite in objects)
        assert later_x > x or later_y > y
        assert len(parsing.parse_attributes(one.answer)) == 4


def test_motion():
    for one in examples("motion", "test", 0, COUNT):
        (clip,) = one.media
        boxes = [box_of(mask) for mask in frames_of(clip, clip.tracks[0])]
        moved = np.diff([[(x0 + x1) / 2, (y0 + y1) / 2] for x0, y0, x1, y1 in boxes], axis=0).sum(axis=0)
        wanted = np.array(DIRECTIONS[one.answer])
        assert (np.sign(moved) * (np.abs(moved) > 2) == wanted).all()
        assert np.abs(moved).max() > 10


@pytest.mark.parametrize("task", ["when", "when_of_two"])
def test_times(task):
    for one in examples(task, "test", 0, COUNT):
        (clip,) = one.media
        (track,) = [track for track in clip.tracks if track.sprite.name == one.truth["asked"]]
        visible = [frame for frame, mask in enumerate(frames_of(clip, track)) if mask.any()]
        assert visible == list(range(visible[0], visible[-1] + 1))
        assert one.truth["span"] == [visible[0], visible[-1] + 1]
        assert parsing.parse_spans(one.answer) == [tuple(one.truth["span"])]
        assert len(visible) < clip.frames
        assert clip.times == [float(frame) for frame in range(clip.frames)]


def test_order():
    for one in examples("order", "test", 0, COUNT):
        (clip,) = one.media
        specs = sorted((track.seen[0], track.sprite.name) for track in clip.tracks)
        assert len({frame for frame, _ in specs}) == len(specs)
        assert one.answer == specs[0 if "first" in one.question else -1][1]


def test_noise_is_faint_and_everywhere():
    noisy = [one.media[0] for one in examples("motion", "train", 0, 60) if one.media[0].noise_seed is not None]
    assert 8 < len(noisy) < 32
    for clip in noisy[:5]:
        film, clean = clip.pixels(), dataclasses.replace(clip, noise_seed=None).pixels()
        assert 0 < np.abs(film.astype(int) - clean.astype(int)).max() <= 6


def test_shapes_fill_their_box():
    for name in SHAPES:
        shape = shape_mask(name)
        assert shape.max() == 255
        assert box_of(shape > 60) == pytest.approx((0, 0, 96, 96), abs=3)


def test_formats():
    assert thousandths((14, 28, 56, 84), 84, 56) == [250, 333, 1000, 1000]
    assert box_answer("ankle boot", [0, 5, 250, 1000]) == "<ref>the ankle boot</ref>[[0,5,250,1000]]"
    assert span_answer(3, 7) == "3.0-7.0 s"
    assert [position_of((x, y, x, y), 90, 30) for y in (15, 45, 75) for x in (5, 15, 25)] == list(POSITIONS)
    assert [position_phrase(place) for place in ("top left", "left", "middle")] == [
        "at the top left",
        "on the left",
        "in the middle",
    ]
    words = ["8", "orange bag", "7", "blue trousers"]
    assert [with_article(word) for word in words] == ["an 8", "an orange bag", "a 7", "blue trousers"]
