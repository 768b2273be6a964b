"""Each part of SAM-2 equals transformers' `sam2_video`, on random widened weights."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.tolerances import PARITY, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from support.sam2_reference import (  # noqa: E402
    PRESENT,
    channels_last,
    layout_of_size,
    sam2_params,
    sam2_reference,
    sam2_tensors,
    tiny_sam2,
)
from vl3_jax.processing.object_prompts import NOT_A_POINT, PADDING  # noqa: E402
from vl3_jax.sam2 import hiera  # noqa: E402
from vl3_jax.sam2.memory_attention import MemoryTokens  # noqa: E402
from vl3_jax.sam2.sam2_config import SIZES  # noqa: E402
from vl3_jax.sam2.sam2_model import ObjectPrompts, Sam2  # noqa: E402

pytestmark = pytest.mark.usefixtures("fast_compile")
CONFIGS = {f"tiny {version}": tiny_sam2(version) for version in ("2.0", "2.1")}
CONFIGS |= {size: layout_of_size(size) for size in SIZES}


@functools.cache
def both(name: str, presence: float = PRESENT):
    config = CONFIGS[name]
    reference = sam2_reference(config, presence=presence)
    return reference, Sam2(config), sam2_params(sam2_tensors(reference), config)


@functools.partial(jax.jit, static_argnums=(0, 2))
def call(model, params, method, *arguments):
    return model.apply({"params": params}, *arguments, method=method)


def report(what: str, pairs: dict) -> None:
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    print(f"{what}: largest relative difference {max(errors.values()):.1e} ({max(errors, key=errors.get)})")
    assert max(errors.values()) <= PARITY, errors


def random_pixels(config, seed=0, images=1):
    shape = (images, config.image_size, config.image_size, 3)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def image(name: str):
    """Returns the features of both sides of one image: the reference's as [1, C, H, W]."""
    reference, model, params = both(name)
    pixels = random_pixels(model.config)
    with torch.no_grad():
        trunk = reference.vision_encoder.backbone(torch.tensor(pixels).permute(0, 3, 1, 2))
        features = reference.get_image_features(torch.tensor(pixels).permute(0, 3, 1, 2)).fpn_hidden_states
    maps = [x.permute(1, 2, 0).reshape(1, x.shape[2], *[int(x.shape[0] ** 0.5)] * 2) for x in features]
    return trunk.intermediate_hidden_states, maps, call(model, params, "encode_image", pixels)


def trunk_stages(module, pixels):
    return [stage.maps() for stage in module.trunk(pixels, module.image_positions())]


@pytest.mark.parametrize("name", ["tiny 2.1", *(pytest.param(size, marks=pytest.mark.slow) for size in SIZES)])
def test_image_encoder(name):
    stages, maps, ours = image(name)
    _, model, params = both(name)
    pixels = random_pixels(model.config)
    trunk = call(model, params, trunk_stages, pixels)
    pairs = {f"stage {i}": (x, y.numpy()) for i, (x, y) in enumerate(zip(trunk, stages, strict=True))}
    pairs |= {
        key: (getattr(ours, key), channels_last(x)) for key, x in zip(("fine", "middle", "coarse"), maps, strict=True)
    }
    report(name, pairs)


@pytest.mark.parametrize("name", ["tiny 2.1", *(pytest.param(size, marks=pytest.mark.slow) for size in SIZES)])
def test_windows_as_segments_of_rows(name, monkeypatch):
    """So they are on a TPU, whose kernels take several windows in a row."""
    _, model, params = both(name)
    pixels = random_pixels(model.config)
    monkeypatch.setattr(hiera, "target_device", lambda: types.SimpleNamespace(platform="tpu"))
    rows = call(Sam2(model.config, name="as on a TPU"), params, trunk_stages, pixels)
    windows = call(model, params, trunk_stages, pixels)
    report(f"{name}, rows of windows", {f"stage {i}": pair for i, pair in enumerate(zip(rows, windows, strict=True))})


def prompts_of(case: str, rng) -> tuple[dict, ObjectPrompts]:
    """Returns the prompts of a case for two objects, as the reference's arguments and as ours."""
    points = rng.uniform(0, 128, (2, 3, 2)).astype(np.float32)
    labels = np.array([[1, 0, NOT_A_POINT], [0, 1, 1]], np.int32)
    boxes = np.sort(rng.uniform(0, 128, (2, 2, 2)).astype(np.float32), axis=1)
    none = np.zeros((2, 1, 2), np.float32), np.full((2, 1), NOT_A_POINT, np.int32)
    coordinates = {"points": [points], "boxes": [boxes], "both": [points, boxes], "nothing": [none[0]]}[case]
    kinds = {"points": [labels], "boxes": [[[2, 3]] * 2], "both": [labels, [[2, 3]] * 2], "nothing": [none[1]]}[case]
    theirs = {"input_points": None, "input_labels": None, "input_boxes": None, "input_masks": None}
    if case != "boxes":
        theirs |= {"input_points": torch.tensor(coordinates[0])[None], "input_labels": torch.tensor(kinds[0])[None]}
    if case in ("boxes", "both"):
        theirs["input_boxes"] = torch.tensor(boxes.reshape(1, 2, 4))
    ours = np.concatenate([*coordinates, none[0]], axis=1), np.concatenate([*kinds, none[1]], axis=1, dtype=np.int32)
    return theirs, ObjectPrompts(*ours, np.array([True, False]))


@pytest.mark.parametrize(
    ("case", "masks"),
    [
        ("both", True),
        pytest.param("both", False, marks=pytest.mark.slow),
        *(
            pytest.param(case, m, marks=pytest.mark.slow)
            for case in ("points", "boxes", "nothing")
            for m in (False, True)
        ),
    ],
)
def test_prompt_encoder_and_mask_decoder(case, masks):
    name = "tiny 2.1"
    _, maps, features = image(name)
    reference, model, params = both(name)
    rng = np.random.default_rng(1)
    theirs, ours = prompts_of(case, rng)
    low = rng.normal(0, 5, (2, 32, 32)).astype(np.float32) if masks else None
    with torch.no_grad():
        sparse, dense = reference.prompt_encoder(**theirs)
        if masks:  # the reference embeds one mask for all objects of an image
            dense = reference.prompt_encoder.mask_embed(torch.tensor(low)[:, None])
        image_features = maps[2] + reference.no_memory_embedding.reshape(1, -1, 1, 1)
        expected = [
            reference.mask_decoder(
                image_embeddings=image_features,
                image_positional_embeddings=reference.get_image_wide_positional_embeddings(),
                sparse_prompt_embeddings=sparse[:, row : row + 1],
                dense_prompt_embeddings=dense[row : row + 1] if masks else dense,
                multimask_output=multimask,
                high_resolution_features=maps[:2],
            )
            for row in range(2)
            for multimask in (False, True)
        ]
    decoded = call(model, params, "segment", features, ours, low)
    pairs = {}
    for row in range(2):
        single, triple = expected[2 * row : 2 * row + 2]
        pairs[f"masks of {row}"] = decoded.masks[row, 1:], triple[0][0, 0].numpy()
        pairs[f"scores of {row}"] = decoded.scores[row, 1:], triple[1][0, 0].numpy()
        pairs[f"tokens of {row}"] = decoded.tokens[row, 1:], triple[2][0, 0].numpy()
        pairs[f"token 0 of {row}"] = decoded.tokens[row, :1], single[2][0, 0].numpy()
        pairs[f"presence of {row}"] = decoded.presence[row, None], triple[3][0, 0].numpy()
    report(f"{case}{' and masks' * masks}", pairs)


@pytest.mark.slow
def test_padding_and_vectors():
    """Padding changes nothing; a vector acts as a point that has the same embedding."""
    name = "tiny 2.1"
    features, (_, model, params) = image(name)[2], both(name)
    _, prompts = prompts_of("points", np.random.default_rng(2))
    expected = call(model, params, "segment", features, prompts)
    far = np.full((2, 4, 2), 1e4, np.float32)
    padded = prompts.replace(
        points=np.concatenate([far, prompts.points], axis=1),
        labels=np.concatenate([np.full((2, 4), PADDING, np.int32), prompts.labels], axis=1),
    )
    embed = lambda module, prompts: module.prompt.points(prompts.points, prompts.labels).tokens  # noqa: E731
    tokens = call(model, params, embed, prompts)
    fewer = prompts.replace(
        points=prompts.points[:, 1:],
        labels=prompts.labels[:, 1:],
        vectors=jnp.concatenate([tokens[:, :1], 1e4 * tokens], axis=1),
        vectors_valid=np.arange(5)[None].repeat(2, 0) < 1,
    )
    for changed in (padded, fewer):
        ours = call(model, params, "segment", features, changed)
        report("padding or vectors", dict(zip(ours._fields, zip(ours, expected, strict=True), strict=True)))


@pytest.mark.parametrize(
    ("name", "presence", "points"),
    [
        ("tiny 2.1", -PRESENT, 1),
        pytest.param("tiny 2.1", PRESENT, 1, marks=pytest.mark.slow),
        pytest.param("tiny 2.1", PRESENT, 2, marks=pytest.mark.slow),
        pytest.param("tiny 2.0", -PRESENT, 2, marks=pytest.mark.slow),
        pytest.param("tiny 2.0", PRESENT, 1, marks=pytest.mark.slow),
    ],
)
def test_conditioning_frame(name, presence, points):
    """One click is ambiguous, two are not; absent objects have no mask, another pointer and a marked memory."""
    maps, features = image(name)[1:]
    reference, model, params = both(name, presence)
    coordinates = np.array([[[30.0, 40.0], [90.0, 60.0]]], np.float32)[:, :points]
    labels = np.array([[1, 0]], np.int32)[:, :points]
    prompts = ObjectPrompts(
        np.pad(coordinates, ((0, 0), (0, 1), (0, 0))),
        np.pad(labels, ((0, 0), (0, 1)), constant_values=NOT_A_POINT),
        np.array([points == 1]),
    )
    ours = call(model, params, "condition", features, prompts)
    with torch.no_grad():
        embeddings = [*maps[:2], maps[2] + reference.no_memory_embedding.reshape(1, -1, 1, 1)]
        expected = reference._single_frame_forward(
            input_points=torch.tensor(coordinates)[None],
            input_labels=torch.tensor(labels)[None],
            image_embeddings=embeddings,
            multimask_output=points == 1,
        )
    pairs = {
        "mask": (ours.mask, expected.pred_masks[0].numpy()),
        "presence": (ours.presence[:, None], expected.object_score_logits[0].numpy()),
        "pointer": (ours.pointer, expected.object_pointer[0].numpy()),
    }
    report(f"{name}, {points} points", pairs | memory_pairs(name, presence, expected.high_res_masks, ours.presence))


def memory_pairs(name, presence_gain, masks, presence) -> dict:
    """Returns our memories and the reference's, of a mask that follows from a prompt and of one that does not."""
    maps, features = image(name)[1:]
    reference, model, params = both(name, presence_gain)
    pairs = {}
    for prompted in (False, True):
        flat = maps[2].flatten(2).permute(2, 0, 1)
        with torch.no_grad():
            theirs, _ = reference._encode_new_memory(flat, masks, torch.tensor(np.array(presence))[:, None], prompted)
        ours = call(model, params, "remember", features, masks[:, 0].numpy(), presence, np.array([prompted]))
        ours = np.asarray(ours.astype(jnp.bfloat16), np.float32)
        rounded = theirs.float()[:, 0][None].numpy()
        step = 2.0 ** (np.floor(np.log2(np.abs(rounded) + 1e-30)) - 7)  # both sides round to bfloat16
        pairs[f"memory, prompted {prompted}"] = np.where(np.abs(ours - rounded) <= 1.01 * step, rounded, ours), rounded
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny 2.0", "tiny 2.1"])
@pytest.mark.parametrize("empty", [False, True])
def test_mask_as_conditioning_frame(name, empty):
    maps, features = image(name)[1:]
    reference, model, params = both(name)
    mask = np.zeros((1, 128, 128), np.float32)
    mask[0, 20:77, 31:90] = not empty
    ours = call(model, params, "condition_on_mask", features, mask)
    with torch.no_grad():
        expected = reference._use_mask_as_output(maps[2], maps[:2], torch.tensor(mask)[None])
    pairs = {
        "mask": (ours.mask, expected.pred_masks[:, 0].numpy()),
        "presence": (ours.presence[:, None], expected.object_score_logits[:, 0].numpy()),
        "pointer": (ours.pointer, expected.object_pointer[0].numpy()),
    }
    report(f"{name}, mask", pairs | memory_pairs(name, PRESENT, expected.high_res_masks, ours.presence))


@pytest.mark.parametrize(
    ("maps", "pointers"), [(3, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 0), (7, 16)))]
)
def test_memory_attention(maps, pointers):
    name = "tiny 2.1"
    reference, model, params = both(name)
    rng, grid, width = np.random.default_rng(3), model.config.grid, model.config.width
    length = maps * grid**2 + pointers * model.config.tokens_per_pointer
    coarse = rng.standard_normal((1, grid**2, width), np.float32)
    memory, positions = rng.standard_normal((2, 1, length, model.config.memory_width), np.float32)
    sequence = lambda x: torch.tensor(x).permute(1, 0, 2)  # noqa: E731
    with torch.no_grad():
        expected = reference.memory_attention(
            sequence(coarse),
            sequence(memory),
            None,
            sequence(positions),
            num_object_pointer_tokens=pointers * model.config.tokens_per_pointer,
        )
    valid = np.arange(length + 5)[None] < length
    garbage = lambda x: np.pad(x, ((0, 0), (0, 5), (0, 0)), constant_values=1e4)  # noqa: E731
    count = maps * model.config.grid**2
    in_maps = positions[0, :count].reshape(maps, -1, model.config.memory_width)
    run = lambda module, *arrays: module.memory_attention(coarse, MemoryTokens(*arrays))  # noqa: E731
    ours = call(model, params, run, garbage(memory), in_maps, garbage(positions[:, count:]), valid)
    report(f"{maps} maps, {pointers} pointers", {"features": (ours, expected[0].numpy())})


def test_positions():
    reference, model, params = both("tiny 2.1")
    cells, times = call(model, params, "memory_positions")
    width = model.config.memory_width
    shape = (1, width, model.config.grid, model.config.grid)
    sine = reference.memory_encoder.position_encoding(shape, "cpu", torch.float32)
    distances = np.array([[1.0, 3.0, -2.0]], np.float32)
    pointers = call(model, params, "pointer_positions", distances, np.float32(7))
    fake = [torch.zeros(1, model.config.width)] * 3
    with torch.no_grad():
        _, expected = reference._process_object_pointers(distances[0].tolist(), fake, 8, 1, model.config.width, "cpu")
    pairs = {
        "cells": (cells, channels_last(sine).reshape(-1, width)),
        "times": (times, reference.memory_temporal_positional_encoding[:, 0, 0].detach().numpy()),
        "pointers": (pointers[0], expected[:: model.config.tokens_per_pointer, 0].numpy()),
    }
    report("positions", pairs)
