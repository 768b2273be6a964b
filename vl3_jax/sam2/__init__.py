"""SAM-2 in JAX: masks of objects in images and videos, by points, boxes and masks.

    from vl3_jax import sam2
    model = sam2.load("facebook/sam2.1-hiera-large")
    masks = model.segment("cat.jpg", points=[(320, 240)]).masks
    for frame in model.track(frames, [sam2.Prompt(frame=0, obj=1, points=[(320, 240, 1)])]):
        print(frame.index, frame.masks.sum())

The modules of this package are pure Flax; the functions that a user calls are those of `vl3_jax.inference`, imported on
first use.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vl3_jax.inference.object_tracker import ObjectTracker, TrackedFrame
    from vl3_jax.inference.segmenter import Segmentation, Segmenter
    from vl3_jax.inference.segmenter import load_segmenter as load
    from vl3_jax.processing.object_prompts import Prompt

_PLACES = {
    "ObjectTracker": ("inference.object_tracker", "ObjectTracker"),
    "Prompt": ("processing.object_prompts", "Prompt"),
    "Segmentation": ("inference.segmenter", "Segmentation"),
    "Segmenter": ("inference.segmenter", "Segmenter"),
    "TrackedFrame": ("inference.object_tracker", "TrackedFrame"),
    "load": ("inference.segmenter", "load_segmenter"),
}
__all__ = ["ObjectTracker", "Prompt", "Segmentation", "Segmenter", "TrackedFrame", "load"]


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(f"vl3_jax.{module}"), attribute)
