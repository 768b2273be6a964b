"""The vision tower by number of patches in a row and in a frame, against transformers' tower."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench.inputs import frame_grid, frames, model_pair
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, REFERENCE, SEPARATE_ROWS, Table
from vl3_jax.bench.timing import measure_case
from vl3_jax.model.vision import VisionTower
from vl3_jax.training.flops import StepWork, step_flops


def measure(settings: Settings) -> Table:
    """Measures every row size with every frame size that fits."""
    pair = model_pair(settings)
    dtype = jnp.dtype(settings.dtype)
    tower = VisionTower(settings.config.vision, dtype, dtype)
    params = {"params": jax.device_put(pair.params["vision"])}
    rows = []
    for row_patches in settings.pick((128,), (4096, 16_384), (4096, 16_384, 65_536)):
        for patches in settings.pick((64,), (64, 256, 1024), (64, 256, 1024, 4096)):
            count = row_patches // patches
            sides = {
                OURS: settings.compiled(tower.apply, params, *frames(count, patches)),
                SEPARATE_ROWS: settings.compiled(tower.apply, params, *frames(count, patches, count)),
            }
            if pair.reference is not None:
                pixels = np.asarray(frames(count, patches)[0]).reshape(count * patches, -1)
                sides[REFERENCE] = pair.reference.tower(pixels, (count, *frame_grid(patches)))
            flops = step_flops(settings.config, StepWork(row_patches, count * patches**2, 0, 0, 0, 0), ())["vision"]
            case = f"{row_patches:,} patches in frames of {patches:,}"
            figures = functools.partial(_time_of_a_frame, count)
            rows += measure_case(case, sides, settings.rounds, count, "frames", flops, figures)
    return Table("tower", f"vision tower of {settings.model}, {settings.dtype}, forward", rows, pair.notes)


def _time_of_a_frame(count: int, side: str, seconds: float) -> dict[str, float]:
    return {"ms a frame": 1e3 * seconds / count}
