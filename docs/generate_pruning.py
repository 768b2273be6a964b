"""The shares of vision tokens that pruning keeps, generated into docs/inference.md: python docs/generate_pruning.py.

The videos are those of the tests, sampled and resized by the default settings; the static scene has 180 frames of 64
blocks, without noise and with normal noise of a standard deviation in grey levels.
"""

import pathlib
import re

import numpy as np

from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.processing.packed_batch import PATCH_DIM, Visual
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.pruning import prune

ROOT = pathlib.Path(__file__).parents[1]
PAGE = pathlib.Path(__file__).with_name("inference.md")
THRESHOLDS = (0.1, 0.5, 1.0, 5.0, 20.0)
BUDGET = 0.5
NOISE = (0.0, 0.03, 0.05, 0.1, 0.5, 2.0)
_MARKERS = re.compile(r"(?<=<!-- pruning -->\n).*(?=<!-- end of pruning -->)", re.DOTALL)


def static_scene(levels: float, frames: int = 180, blocks: int = 64) -> Visual:
    """Returns a static scene with noise of a standard deviation in grey levels."""
    rng = np.random.default_rng(0)
    scene = rng.uniform(20, 235, (blocks, 4 * PATCH_DIM))
    noisy = (np.rint(scene + rng.normal(0, levels, scene.shape) if levels else scene) for _ in range(frames))
    patches = np.stack([np.clip(frame, 0, 255).astype(np.uint8) for frame in noisy]).reshape(-1, PATCH_DIM)
    return Visual(patches, (frames, 2, 2 * blocks), 2)


def videos() -> dict[str, Visual]:
    """Returns each video by its name in the table."""
    processor = Processor.from_folder(ROOT / "vl3_jax" / "nano", prune_threshold=None, fps=1.0, max_frames=180)
    found = {}
    for path in sorted((ROOT / "tests" / "data" / "media" / "videos").iterdir()):
        media = processor.read_media([Turn("user", [MediaPart("video", str(path))])])
        (found[path.name],) = media.visuals
    return found | {f"static scene, noise of {levels:g} levels": static_scene(levels) for levels in NOISE}


def table() -> str:
    """Returns the table."""
    thresholds = " | ".join(f"{threshold:g}" for threshold in THRESHOLDS)
    lines = [
        f"| share kept with a threshold of | {thresholds} | threshold of `--visual-budget {BUDGET}` |",
        f"|{' --- |' * (len(THRESHOLDS) + 2)}",
    ]
    for name, video in videos().items():
        kept = [
            prune([video], [True], ProcessorConfig(prune_threshold=threshold))[0][0].keep.mean()
            for threshold in THRESHOLDS
        ]
        _, chosen = prune([video], [True], ProcessorConfig(visual_budget=BUDGET))
        lines.append(f"| {name} | {' | '.join(f'{share:.1%}' for share in kept)} | {chosen:g} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(_MARKERS.sub(table().replace("\\", "\\\\"), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
