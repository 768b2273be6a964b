"""Pixels, points and masks are prepared and brought back as transformers' SAM-2 processors do it."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from support.tolerances import PARITY, RESIZED_LEVELS, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


from support.sam2_reference import Sam2ImageProcessor, Sam2VideoProcessor, Sam2VideoVideoProcessor  # noqa: E402
from vl3_jax.errors import InputError  # noqa: E402
from vl3_jax.processing.object_prompts import Prompt, input_mask, point_arrays, read_mask  # noqa: E402
from vl3_jax.processing.resampling import bicubic_matrix, bilinear_matrix  # noqa: E402
from vl3_jax.processing.segmentation_pixels import enlarge_masks, input_pixels  # noqa: E402

SIZES = [(48, 64), (200, 90), (33, 129), (96, 96), (7, 300)]
SIDE = 96


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def normalised(pixels: np.ndarray) -> np.ndarray:
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    return (pixels.astype(np.float32) / 255 - mean) / std


@functools.cache
def processor() -> Sam2VideoProcessor:
    size = {"height": SIDE, "width": SIDE}
    return Sam2VideoProcessor(Sam2ImageProcessor(size=size), Sam2VideoVideoProcessor(size=size), target_size=SIDE)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_and_frames(size):
    frames = [picture(*size, seed) for seed in range(2)]
    images = processor().image_processor(frames, return_tensors="pt")["pixel_values"]
    video = processor().video_processor([torch.tensor(np.stack(frames)).permute(0, 3, 1, 2)], return_tensors="pt")
    video = video["pixel_values_videos"][0]
    ours = normalised(np.stack([input_pixels(Image.fromarray(frame), SIDE, "bilinear") for frame in frames]))
    level = 1 / 255 / 0.224
    for name, theirs in (("images", images), ("video", video)):
        error = np.abs(ours - theirs.permute(0, 2, 3, 1).numpy()).max() / level
        print(f"{name} of {size}: largest difference {error:.2f} levels")
        assert error <= RESIZED_LEVELS


def test_bicubic_is_pillows():
    image = Image.fromarray(picture(48, 64))
    np.testing.assert_array_equal(input_pixels(image, SIDE, "bicubic"), np.asarray(image.resize((SIDE, SIDE))))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_points_and_masks(size):
    height, width = size
    rows, columns = np.ogrid[:height, :width]
    mask = (rows / height - 0.4) ** 2 + (columns / width - 0.6) ** 2 < 0.1
    session = processor().init_video_session()
    points, box = [(0.3 * width, 0.7 * height, 1), (0.9 * width, 0.1 * height, 0)], (0.1 * width, 0, width, height)
    arguments = {"original_size": size, "input_boxes": [[list(box)]]}
    arguments |= {
        "input_points": [[[list(point[:2]) for point in points]]],
        "input_labels": [[[point[2] for point in points]]],
    }
    processor().add_inputs_to_inference_session(session, 0, 1, **arguments)
    theirs = session.point_inputs_per_obj[0][0]
    prompt = Prompt(points=points, box=box).checked(*size)
    coordinates, labels = point_arrays([prompt], size, SIDE, 5)
    np.testing.assert_allclose(coordinates[0, :4], theirs["point_coords"][0, 0].numpy(), rtol=1e-6)
    np.testing.assert_array_equal(labels[0], [*theirs["point_labels"][0, 0].tolist(), -1])
    session.dtype = torch.float32
    processor().add_inputs_to_inference_session(session, 1, 1, input_masks=[mask])
    theirs = session.mask_inputs_per_obj[0][1][0, 0].numpy()
    assert np.mean(input_mask(mask, SIDE) != theirs) < 1e-3  # a weight of exactly one half may round either way


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_masks_at_the_size_of_the_image(size):
    low = np.random.default_rng(0).normal(0, 5, (1, 3, 24, 24)).astype(np.float32)
    theirs = processor().post_process_masks([torch.tensor(low[0])[None]], [size], binarize=False)[0].numpy()
    assert relative_error(enlarge_masks(low, size), theirs) <= PARITY
    once = torch.nn.functional.interpolate(torch.tensor(low[0])[None], (SIDE, SIDE), mode="bilinear")
    twice = torch.nn.functional.interpolate(once, size, mode="bilinear").numpy()
    assert relative_error(enlarge_masks(low, size, through=SIDE), twice) <= PARITY


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 40), target=st.integers(1, 60), mode=st.sampled_from(["bicubic", "bilinear", "antialias"]))
def test_resampling_matrices(size, target, mode):
    line = np.random.default_rng(size).standard_normal((1, 1, size, 3)).astype(np.float32)
    name, antialias = ("bilinear", True) if mode == "antialias" else (mode, False)
    interpolate = torch.nn.functional.interpolate
    theirs = interpolate(torch.tensor(line), (target, 3), mode=name, antialias=antialias, align_corners=False)
    matrix = bicubic_matrix(size, target) if mode == "bicubic" else bilinear_matrix(size, target, antialias)
    np.testing.assert_allclose(matrix @ line[0, 0], theirs[0, 0].numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (Prompt(points=[(70, 5, 1)]), r"\(70, 5\) is outside the frame of 64 x 48 pixels"),
        (Prompt(points=[(float("nan"), 5, 1)]), "outside"),
        (Prompt(points=[(5, 5, 2)]), "label 2"),
        (Prompt(box=(5, 5, 5, 20)), "no area"),
        (Prompt(box=(5, 5, 200, 20)), "outside"),
        (Prompt(mask=np.ones((3, 4), bool)), "the mask has 4 x 3 pixels, the frame 64 x 48"),
        (Prompt(mask="missing.png"), "missing.png"),
        (Prompt(mask=np.ones((48, 64)), points=[(1, 1, 1)]), "stands alone"),
        (Prompt(), "no point, box or mask"),
    ],
)
def test_prompts_that_cannot_be_used(prompt, text):
    with pytest.raises(InputError, match=text) as error:
        prompt.checked(48, 64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("white", [1, 255])
def test_masks_from_files(tmp_path, white):
    mask = picture(20, 30)[..., 0] > 128
    Image.fromarray(mask.astype(np.uint8) * white).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), mask)
