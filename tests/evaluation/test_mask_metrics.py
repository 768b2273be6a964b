"""Metrics of masks and of grounded captions: hand-made masks, and pycocotools where it has the same metric."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from vl3_jax.evaluation.scorers.boundary import boundary_similarity
from vl3_jax.evaluation.scorers.grounded_captions import compare_grounding, grounding_metrics
from vl3_jax.evaluation.scorers.mask_overlap import (
    Detections,
    Overlap,
    average_precision,
    cumulative_iou,
    generalised_iou,
    greedy_pairs,
    paired_iou,
    pairwise_iou,
    pixel_accuracy,
    robustness,
)
from vl3_jax.evaluation.scorers.phrases import embedding_similarity, lemma_similarity

EMPTY = np.zeros((20, 30), bool)


def box(rows: slice, columns: slice) -> np.ndarray:
    mask = EMPTY.copy()
    mask[rows, columns] = True
    return mask


SQUARE = box(slice(5, 15), slice(5, 15))
SHIFTED = box(slice(5, 15), slice(10, 20))  # half of the square: IoU 1/3
SEEDS = st.integers(0, 2**32 - 1)


def blobs(rng: np.random.Generator, count: int) -> np.ndarray:
    masks = np.zeros((count, 24, 24), bool)
    for mask in masks:
        top, left = rng.integers(0, 12, 2)
        height, width = rng.integers(1, 13, 2)
        mask[top : top + height, left : left + width] = True
    return masks


def test_intersection_over_union():
    assert Overlap.of(SQUARE, SHIFTED) == (50, 150)
    overlaps = [Overlap.of(*pair) for pair in ((SQUARE, SHIFTED), (EMPTY, EMPTY), (EMPTY, SQUARE))]
    assert [overlap.iou for overlap in overlaps] == [pytest.approx(1 / 3), 1, 0]
    assert cumulative_iou(overlaps) == 50 / 250
    assert generalised_iou(overlaps) == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert cumulative_iou([]) == generalised_iou([]) == 0
    assert cumulative_iou([Overlap(0, 0)]) == 1
    with pytest.raises(ValueError, match="one size"):
        Overlap.of(SQUARE, SQUARE[1:])


@given(SEEDS)
def test_pairwise_iou_is_that_of_coco(seed):
    rng = np.random.default_rng(seed)
    first, second = blobs(rng, 3), blobs(rng, 4)
    encoded = [[coco.encode(np.asfortranarray(mask, np.uint8)) for mask in masks] for masks in (first, second)]
    np.testing.assert_allclose(pairwise_iou(first, second), coco.iou(*encoded, [0] * 4))


def test_pairs_are_formed_by_the_largest_overlap():
    ious = np.array([[0.6, 0.9], [0.0, 0.8], [0.0, 0.0]])
    assert greedy_pairs(ious) == [(0, 1)], "the second prediction overlaps nothing that is left"
    assert paired_iou(ious) == pytest.approx(0.9)
    assert greedy_pairs(ious, np.array([[True, False], [True, True], [True, True]])) == [(1, 1), (0, 0)]
    assert paired_iou(np.zeros((0, 2))) == paired_iou(np.zeros((2, 0))) == 0


def ap50_of_coco(predicted, targets, scores) -> float:
    """Returns AP50 by COCO's own code."""
    encode = lambda mask: coco.encode(np.asfortranarray(mask, np.uint8))  # noqa: E731
    annotations, results = [], []
    for image, masks in enumerate(targets):
        for mask in masks:
            entry = {"segmentation": encode(mask), "area": float(mask.sum()), "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": 1} | entry)
    for image, (masks, values) in enumerate(zip(predicted, scores, strict=True)):
        entries = [{"segmentation": encode(mask), "score": float(s)} for mask, s in zip(masks, values, strict=True)]
        results += [{"image_id": image, "category_id": 1} | entry for entry in entries]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        images = [{"id": image, "height": 24, "width": 24} for image in range(len(targets))]
        truth.dataset = {"info": {}, "images": images, "categories": [{"id": 1}], "annotations": annotations}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, 0, 0, -1]  # IoU 0.5, areas of all sizes, at most 100 predictions
    return float(precision.mean())


@given(SEEDS, st.booleans())
def test_average_precision_is_that_of_coco(seed, ties):
    """With ties, as where no prediction has a score, the order of images and predictions decides."""
    rng = np.random.default_rng(seed)
    targets = [blobs(rng, count) for count in rng.integers(1, 4, 3)]
    predicted = [np.concatenate([masks, blobs(rng, 2)])[rng.permutation(len(masks) + 2)] for masks in targets]
    scores = [rng.permutation(100)[: len(masks)] / 100 + image / 1000 for image, masks in enumerate(predicted)]
    scores = [np.ones(len(each)) for each in scores] if ties else scores
    tables = [pairwise_iou(*pair) for pair in zip(predicted, targets, strict=True)]
    ours = average_precision([Detections(*pair) for pair in zip(tables, scores, strict=True)])
    assert ours == pytest.approx(ap50_of_coco(predicted, targets, scores))


def test_average_precision_without_anything():
    assert average_precision([]) == 0
    assert average_precision([Detections(np.zeros((0, 2)), np.zeros(0))]) == 0
    assert average_precision([Detections(np.zeros((2, 0)), np.zeros(2))]) == 0


def test_boundaries():
    assert boundary_similarity(SQUARE, SQUARE) == boundary_similarity(EMPTY, EMPTY) == 1
    assert boundary_similarity(~EMPTY, EMPTY) == 1, "a mask that fills the image has no boundary"
    assert boundary_similarity(SQUARE, EMPTY) == boundary_similarity(EMPTY, SQUARE) == 0
    # The tolerance is ceil(0.008 * 36.06) = 1 pixel.
    assert boundary_similarity(box(slice(6, 16), slice(5, 15)), SQUARE) == 1
    assert boundary_similarity(box(slice(0, 2), slice(20, 22)), SQUARE) == 0
    # Boundaries are 40 pixels each; those of the left and right sides lie apart, of the long ones 5 + 1 are near.
    assert 0 < boundary_similarity(SHIFTED, SQUARE) < 0.7


def test_boundary_pixels_by_hand():
    """A lower half, whose boundary is the row above it, and one that is moved down."""
    lower, moved = np.zeros((2, 60, 80), bool)
    lower[30:], moved[32:] = True, True
    assert boundary_similarity(lower, moved) == 0, "ceil(0.8) = 1 pixel"
    large = [np.kron(mask, np.ones((10, 10), bool)) for mask in (lower, moved)]
    assert boundary_similarity(*large) == 0, "20 pixels apart, and 8 are near"
    large[1] = np.roll(large[0], 8, axis=0)
    large[1][:8] = False
    assert boundary_similarity(*large) == 1


def davis(predicted: np.ndarray, target: np.ndarray) -> float:
    """Returns F by the rule of DAVIS as it is written: boundaries pixel by pixel, widened by a disk."""
    height, width = target.shape
    radius = int(np.ceil(0.008 * np.linalg.norm(target.shape)))
    disk = [[y * y + x * x <= radius * radius for x in range(-radius, radius + 1)] for y in range(-radius, radius + 1)]
    edges = np.zeros((2, height, width), bool)
    for edge, mask in zip(edges, (predicted, target), strict=True):
        for y, x in np.ndindex(height, width):
            below, right = min(y + 1, height - 1), min(x + 1, width - 1)
            edge[y, x] = len({mask[y, x], mask[below, x], mask[y, right], mask[below, right]}) == 2
    counts = edges.sum(axis=(1, 2))
    if not counts.all():
        return float(not counts.any())
    wide = [ndimage.binary_dilation(edge, disk) for edge in edges]
    precision, recall = ((edge & other).sum() / edge.sum() for edge, other in zip(edges, wide[::-1], strict=True))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_boundaries_are_those_of_davis(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 30, 2)
    target = np.kron(rng.random((height, width)) < rng.random(), np.ones((8, 8), bool)).astype(bool)
    predicted = np.roll(target, rng.integers(-6, 7, 2), (0, 1)) ^ (rng.random(target.shape) < 0.1 * rng.random() ** 4)
    assert boundary_similarity(predicted, target) == pytest.approx(davis(predicted, target), abs=1e-12)


def test_accuracy_and_robustness():
    """Of 600 pixels 50 are too many and 50 too few; all objects are 200."""
    assert pixel_accuracy(SHIFTED, SQUARE) == pytest.approx(1 - 100 / 600)
    assert pixel_accuracy(EMPTY, EMPTY) == 1
    objects = SQUARE | box(slice(0, 10), slice(20, 30))
    assert robustness(SHIFTED, SQUARE, objects) == pytest.approx(1 - 50 / 200)
    assert robustness(SQUARE, SQUARE, objects) == robustness(EMPTY, EMPTY, EMPTY) == 1
    assert robustness(~EMPTY, SQUARE, objects) == 0, "not below"
    assert robustness(SQUARE, EMPTY, EMPTY) == 0


def test_phrases_by_lemma():
    first = ["the two red boxes", "a woman's dog", "people", ""]
    second = ["two red box", "women with dogs", "a cat", ""]
    similarity = lemma_similarity(first, second)
    assert similarity[0] == pytest.approx([1, 0, 0, 0])
    assert similarity[1] == pytest.approx([0, 1, 0, 0])
    assert similarity[3, 3] == 1
    assert lemma_similarity(["glass bus"], ["glass"])[0, 0] == pytest.approx(0.5**0.5), "no plurals"
    assert lemma_similarity([], ["a"]).shape == (0, 1)


def test_phrases_by_embedding():
    vectors = {"a": [1, 0], "b": [1, 1], "c": [0, 0]}
    similarity = embedding_similarity(lambda phrases: np.array([vectors[phrase] for phrase in phrases]))
    np.testing.assert_allclose(similarity(["a", "c"], ["a", "b"]), [[1, 0.5**0.5], [0, 0]])
    assert similarity([], ["a"]).shape == (0, 1)


def test_grounding():
    targets, phrases = np.stack([SQUARE, box(slice(0, 4), slice(20, 30))]), ["a square", "the bars"]
    right = compare_grounding(["the bar", "squares"], targets[::-1], phrases, targets, lemma_similarity)
    assert right.recalled == 2
    swapped = compare_grounding(["squares", "the bar"], targets[::-1], phrases, targets, lemma_similarity)
    assert swapped.recalled == 0, "the masks are right, and the phrases are not"
    nothing = compare_grounding([], np.zeros((0, 20, 30), bool), phrases, targets, lemma_similarity)
    assert grounding_metrics([right]) == {"mIoU": 100, "Recall": 100, "AP50": 100}
    metrics = grounding_metrics([right, swapped, nothing])
    assert metrics["mIoU"] == pytest.approx(200 / 3)
    assert metrics["Recall"] == pytest.approx(100 / 3)
    assert 0 < metrics["AP50"] < 100
    assert grounding_metrics([]) == {"mIoU": 0, "Recall": 0, "AP50": 0}


def test_the_official_recall_ends_at_the_first_phrase_that_differs():
    targets = np.stack([SQUARE, box(slice(0, 4), slice(20, 30))])
    arguments = ["a bird", "bars"], targets, ["square", "bar"], targets, lemma_similarity
    assert compare_grounding(*arguments).recalled == 1
    assert compare_grounding(*arguments, official=True).recalled == 0
