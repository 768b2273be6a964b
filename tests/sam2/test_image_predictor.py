"""Images of any shape are segmented as transformers' image predictor does it, to masks of that shape."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

from support.tolerances import END_TO_END, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from support.sam2_reference import (  # noqa: E402
    Sam2ImageProcessor,
    Sam2Processor,
    image_reference,
    sam2_params,
    sam2_reference,
    sam2_tensors,
    tiny_sam2,
)
from vl3_jax.inference.segmenter import Segmenter  # noqa: E402
from vl3_jax.processing.segmentation_pixels import input_pixels  # noqa: E402
from vl3_jax.sam2.sam2_model import Sam2  # noqa: E402

pytestmark = pytest.mark.usefixtures("fast_compile")
CASES = {  # height and width of the image, seed, added to the presence logit
    "square": (128, 128, 0, 10.0),
    "wide": (37, 301, 1, 10.0),
    "one column": (90, 1, 2, 10.0),
    "one row": (1, 64, 3, 10.0),
    "absent": (200, 111, 4, -10.0),
}


@functools.cache
def both(seed: int, presence: float):
    config = tiny_sam2("2.1", memory_layers=1)
    reference = sam2_reference(config, seed=seed, presence=presence)
    size = {"height": config.image_size, "width": config.image_size}
    processor = Sam2Processor(Sam2ImageProcessor(size=size), target_size=config.image_size)
    params = jax.device_put(sam2_params(sam2_tensors(reference), config))
    return image_reference(reference), processor, Segmenter(Sam2(config), params)


@pytest.mark.parametrize(
    "case", [name if name in ("square", "one column") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_an_image(case):
    """Points and boxes, three masks or the single one, and a second call that corrects the first one's mask."""
    height, width, seed, presence = CASES[case]
    reference, processor, segmenter = both(seed, presence)
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    points = [(rng.uniform(0, width), rng.uniform(0, height), label) for label in (1, 0, 1)]
    box = [0.1 * width, 0.2 * height, 0.8 * width, 0.9 * height]
    encoded, low, config = segmenter.encode(image), None, segmenter.model.config
    resized = input_pixels(Image.fromarray(image), config.image_size, config.resample)  # torchvision rounds otherwise
    pixels = (resized / np.float32(255) - np.float32(config.image_mean)) / np.float32(config.image_std)
    calls = (points[:1], None, True), (points, None, False), ([], box, False), (points, box, True)
    for own, corners, multimask in calls:
        prompts = {"input_boxes": [[corners]]} if corners else {}
        if own:
            prompts |= {"input_points": [[[list(point[:2]) for point in own]]], "input_labels": [[[p[2] for p in own]]]}
        # Otherwise transformers takes an image of one row for one of one channel.
        inputs = processor(image, return_tensors="pt", input_data_format="channels_last", **prompts)
        sizes = inputs.pop("original_sizes")
        inputs["pixel_values"] = torch.tensor(pixels).permute(2, 0, 1)[None]
        masks = None if low is None else torch.tensor(low)[None, None]
        with torch.no_grad():
            theirs = reference(**inputs, input_masks=masks, multimask_output=multimask)
        order = np.argsort(-theirs.iou_scores[0, 0].numpy())
        full = processor.post_process_masks(theirs.pred_masks, sizes, binarize=False)[0][0].numpy()[order]
        ours = segmenter.segment(encoded, points=own, box=corners, logits=low, multimask=multimask)
        pairs = {
            "logits": (ours.logits, theirs.pred_masks[0, 0].numpy()[order]),
            "scores": (ours.scores, theirs.iou_scores[0, 0].numpy()[order]),
            "presence": ([ours.presence], theirs.object_score_logits.numpy().ravel()),
        }
        errors = {name: relative_error(*pair) for name, pair in pairs.items()}
        print(f"{case}, {len(own)} points{', box' * bool(corners)}: {errors}")
        assert max(errors.values()) <= END_TO_END, errors
        certain = np.abs(full) > END_TO_END * np.abs(full).max()
        np.testing.assert_array_equal(ours.masks[certain], (full > 0)[certain])
        low = ours.logits[0]
