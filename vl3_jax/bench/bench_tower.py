"""Milliseconds a frame of the vision tower, by the size of the pack and of the frame, beside transformers' tower."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench import reference
from vl3_jax.bench.inputs import Weights, frames, grid_of, weights
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.bench.timing import in_turns
from vl3_jax.model.vision import VisionTower
from vl3_jax.training.flops import StepWork, step_flops

ALONE = "separate rows"


def measure(settings: Settings) -> Table:
    """Every size of pack with every size of frame that it holds."""
    both = weights(settings)
    dtype = jnp.dtype(settings.dtype)
    tower = VisionTower(settings.config.vision, dtype, dtype)
    params = jax.device_put(both.params["vision"])
    rows = []
    for pack in settings.pick((128,), (4096, 16_384), (4096, 16_384, 65_536)):
        for patches in settings.pick((64,), (64, 256, 1024), (64, 256, 1024, 4096)):
            count = pack // patches
            sides = {
                OURS: settings.compiled(functools.partial(_encode, tower), params, *frames(count, patches)),
                ALONE: settings.compiled(functools.partial(_encode, tower), params, *frames(count, patches, count)),
            }
            if both.reference is not None:
                sides[reference.SIDE] = _theirs(both, count, patches)
            flops = step_flops(settings.config, StepWork(pack, count * patches**2, 0, 0, 0, 0), ())["vision"]
            seconds = in_turns(sides, settings.rounds)
            case = f"{pack:,} patches in frames of {patches:,}"
            rows += [
                Row(case, side, time, count, "frames", flops, {"ms a frame": 1e3 * time / count})
                for side, time in seconds.items()
            ]
    return Table("tower", f"vision tower of {settings.model}, {settings.dtype}, forward", rows, both.notes)


def _encode(tower: VisionTower, params: dict, *arrays: jax.Array) -> jax.Array:
    return tower.apply({"params": params}, *arrays)


def _theirs(both: Weights, count: int, patches: int):
    import torch

    model = both.reference.model.vision_model
    pixels = reference.normalise(np.asarray(frames(count, patches)[0]).reshape(count * patches, -1))
    inputs = {
        "pixel_values": torch.tensor(pixels).to(model.device, model.dtype),
        "grid_thw": torch.tensor([[count, *grid_of(patches)]]).to(model.device),
        "merge_sizes": torch.tensor([1]).to(model.device),
    }
    return reference.finished(model, lambda: model(**inputs))
