"""Tests the model against the reference, stage by stage, on identical pixels and scaled-up random weights."""

import dataclasses
import functools

import numpy as np
import pytest

from support.forward import forward, forward_stages, to_numpy
from support.samples import random_sample, random_visual, shape_for
from support.tolerances import MUTANT, PARITY, relative_error
from vl3_jax.model import VideoLLaMA3, preset
from vl3_jax.processing.packed_batch import block_coordinates, pack

pytest.importorskip("support.reference", reason="the reference is not installed: pip install -e '.[parity]'")
from support.reference import is_video, native_params, reference_model, run_stages, tensors


@functools.cache
def reference_and_model(name: str):
    """Returns the reference, our model of the same configuration, and the reference's weights in our tree."""
    config = preset(name)
    reference = reference_model(config)
    return reference, VideoLLaMA3(config), native_params(tensors(reference), config)


def make_samples(case: str, rng: np.random.Generator):
    image_1 = functools.partial(random_visual, rng, (1, 6, 10), 1)
    image_2 = functools.partial(random_visual, rng, (1, 8, 6), 2)
    video = functools.partial(random_visual, rng, (4, 4, 6), 2)
    return {
        "text": lambda: [random_sample(rng, [], text=40)],
        "image, merge 1": lambda: [random_sample(rng, [image_1()])],
        "image, merge 2": lambda: [random_sample(rng, [image_2()])],
        "two images": lambda: [random_sample(rng, [image_1(), random_visual(rng, (1, 3, 5), 1)])],
        "image and video": lambda: [random_sample(rng, [image_1(), video()])],
        "pruned video": lambda: [random_sample(rng, [video(still=0.6)])],
        "batch of lengths": lambda: [
            random_sample(rng, [image_1()], text=9),
            random_sample(rng, [], text=30),
            random_sample(rng, [image_2(), video(still=0.4)], text=4),
        ],
    }[case]()


CASES = [
    "text",
    "image, merge 1",
    "image, merge 2",
    "two images",
    "image and video",
    "pruned video",
    "batch of lengths",
]


def stage_errors(ours: dict, reference, samples) -> dict[str, float]:
    """Returns the largest relative difference of each stage, without padding."""
    errors = {}
    # The reference runs images and videos separately; here they share one row per sample, in order of appearance.
    visuals = [(row, visual) for row, sample in enumerate(samples) for visual in sample.visuals]
    starts, patch_slices, token_slices = {}, [], []
    for row, visual in visuals:
        first_patch, first_token = starts.get(row, (0, 0))
        starts[row] = (first_patch + len(visual.patches), first_token + visual.num_tokens)
        patch_slices.append((is_video(visual), row, np.arange(first_patch, starts[row][0])))
        token_slices.append((is_video(visual), row, np.arange(first_token, starts[row][1])))
    if visuals:

        def gather(array, slices):
            images_first = sorted(slices, key=lambda item: item[0])
            return np.concatenate([array[row, indices] for _, row, indices in images_first])

        keep = np.concatenate([visual.keep for _, visual in sorted(visuals, key=lambda item: is_video(item[1]))])
        errors["patch embedding"] = relative_error(
            gather(ours["patch_embed"][:, 0], patch_slices), reference.patch_embed
        )
        for i, expected in enumerate(reference.tower):
            errors[f"tower block {i}"] = relative_error(gather(ours["tower"][i][:, 0], patch_slices), expected)
        errors["merge"] = relative_error(gather(ours["merged"], token_slices), reference.merged[keep])
        errors["projector"] = relative_error(gather(ours["projected"], token_slices), reference.projected[keep])
    lengths = [len(sample.tokens) for sample in samples]

    def without_padding(array):
        return np.concatenate([array[row, :length] for row, length in enumerate(lengths)])

    for i, expected in enumerate(reference.decoder):
        errors[f"decoder layer {i}"] = relative_error(without_padding(ours["decoder"][i]), without_padding(expected))
    errors["logits"] = relative_error(without_padding(ours["logits"]), without_padding(reference.logits))
    return errors


@pytest.mark.parametrize("size", ["tiny", "mid"])
@pytest.mark.parametrize("case", CASES)
def test_every_stage_equals_the_reference(size, case):
    reference, model, params = reference_and_model(size)
    samples = make_samples(case, np.random.default_rng(1))
    rows = [[sample] for sample in samples]
    batch = pack(rows, shape_for(rows))
    ours = to_numpy(forward_stages(model, params, batch))
    errors = stage_errors(ours, run_stages(reference, samples), samples)
    worst = max(errors, key=errors.get)
    print(f"{size}, {case}: largest relative difference {errors[worst]:.1e} ({worst}); logits {errors['logits']:.1e}")
    assert errors[worst] <= PARITY, errors


# --- Deliberate mistakes, each of which the comparison above must detect.


def _raster_order(batch, samples):
    coordinates = batch["patch_hw"].copy()
    start = 0
    for visual in samples[0].visuals:
        for _ in range(visual.grid[0]):
            size = visual.patches_per_frame
            coordinates[0, 0, start : start + size] = block_coordinates(*visual.grid[1:], 1)
            start += size
    return {"patch_hw": coordinates}


def _shifted_keep_mask(batch, samples):
    shifted = [dataclasses.replace(v, keep=np.roll(v.keep, 1)) if is_video(v) else v for v in samples[0].visuals]
    sample = dataclasses.replace(samples[0], visuals=shifted)
    return {"token_patches": pack([[sample]], shape_for([samples]))["token_patches"]}


def _late_positions(batch, samples):
    """Shifts everything after the first vision token by one position."""
    first = int(np.argmax(samples[0].is_vision))
    positions = batch["positions"].copy()
    positions[0, first + 1 : len(samples[0].tokens)] += 1
    return {"positions": positions}


BATCH_MUTANTS = {
    "no rotary positions in the tower": lambda batch, _: {"patch_hw": np.zeros_like(batch["patch_hw"])},
    "rows and columns swapped": lambda batch, _: {"patch_hw": batch["patch_hw"][..., ::-1].copy()},
    "raster order instead of block order": _raster_order,
    "frames leak into each other": lambda batch, _: {"patch_segment": np.minimum(batch["patch_segment"], 1)},
    "keep-mask shifted by one": _shifted_keep_mask,
    "positions off by one": _late_positions,
}

VISION_ACT = {"vision": dataclasses.replace(preset("tiny").vision, hidden_act="gelu")}
CONFIG_MUTANTS = {
    "erf for tanh GELU in the tower": VISION_ACT,
    "tanh for erf GELU in the projector": {"projector_act": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("mutant", [*BATCH_MUTANTS, *CONFIG_MUTANTS])
def test_a_deliberate_mistake_is_detected(mutant):
    reference, model, params = reference_and_model("tiny")
    rng = np.random.default_rng(2)
    visuals = [random_visual(rng, (1, 6, 10), 2), random_visual(rng, (4, 4, 6), 2, still=0.6)]
    samples = [random_sample(rng, visuals)]
    batch = pack([samples], shape_for([samples]))
    expected = run_stages(reference, samples).logits[0]
    if mutant in BATCH_MUTANTS:
        wrong = forward(model, params, batch | BATCH_MUTANTS[mutant](batch, samples))
    else:
        wrong = forward(VideoLLaMA3(dataclasses.replace(model.config, **CONFIG_MUTANTS[mutant])), params, batch)
    right = forward(model, params, batch)
    length = len(samples[0].tokens)
    error = relative_error(wrong[0, :length], expected)
    print(f"{mutant}: relative difference of the logits {error:.1e}")
    assert relative_error(right[0, :length], expected) <= PARITY
    assert error > MUTANT
