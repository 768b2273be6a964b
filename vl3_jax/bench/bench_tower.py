"""The vision tower by number of patches in a row and in a frame, against transformers' tower."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench import reference
from vl3_jax.bench.inputs import ModelPair, frame_grid, frames, model_pair
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.bench.timing import in_turns
from vl3_jax.model.vision import VisionTower
from vl3_jax.training.flops import StepWork, step_flops

SEPARATE_ROWS = "separate rows"


def measure(settings: Settings) -> Table:
    """Measures every row size with every frame size that fits."""
    pair = model_pair(settings)
    dtype = jnp.dtype(settings.dtype)
    tower = VisionTower(settings.config.vision, dtype, dtype)
    params = jax.device_put(pair.params["vision"])
    rows = []
    encode = functools.partial(_encode, tower)
    for row_patches in settings.pick((128,), (4096, 16_384), (4096, 16_384, 65_536)):
        for patches in settings.pick((64,), (64, 256, 1024), (64, 256, 1024, 4096)):
            count = row_patches // patches
            sides = {
                OURS: settings.compiled(encode, params, *frames(count, patches)),
                SEPARATE_ROWS: settings.compiled(encode, params, *frames(count, patches, count)),
            }
            if pair.reference is not None:
                sides[reference.SIDE] = _reference(pair, count, patches)
            flops = step_flops(settings.config, StepWork(row_patches, count * patches**2, 0, 0, 0, 0), ())["vision"]
            seconds = in_turns(sides, settings.rounds)
            case = f"{row_patches:,} patches in frames of {patches:,}"
            rows += [
                Row(case, side, time, count, "frames", flops, {"ms a frame": 1e3 * time / count})
                for side, time in seconds.items()
            ]
    return Table("tower", f"vision tower of {settings.model}, {settings.dtype}, forward", rows, pair.notes)


def _encode(tower: VisionTower, params: dict, *arrays: jax.Array) -> jax.Array:
    return tower.apply({"params": params}, *arrays)


def _reference(pair: ModelPair, count: int, patches: int):
    import torch

    model = pair.reference.model.vision_model
    pixels = reference.normalise(np.asarray(frames(count, patches)[0]).reshape(count * patches, -1))
    inputs = {
        "pixel_values": torch.tensor(pixels).to(model.device, model.dtype),
        "grid_thw": torch.tensor([[count, *frame_grid(patches)]]).to(model.device),
        "merge_sizes": torch.tensor([1]).to(model.device),
    }
    return reference.synchronised(model, lambda: model(**inputs))
