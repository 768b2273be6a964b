"""What things lie on: flat, shaded, clouded, striped or grainy grounds of muted colour, drawn from a few numbers."""

import dataclasses
import math

import numpy as np
from PIL import Image

KINDS = ("flat", "shaded", "clouded", "striped", "grainy")
_CHANCES = (0.3, 0.2, 0.2, 0.15, 0.15)
_DARK, _LIGHT = (10, 88), (178, 232)
_TINT = 14  # grey levels by which a channel may differ from the others
_STRIPES = 22  # difference of two stripes, at most
_GRAIN = 14


@dataclasses.dataclass(frozen=True)
class Background:
    """A ground, by the numbers that it is drawn from.

    Attributes:
      kind: one of `KINDS`.
      first: RGB; the only colour of a flat ground.
      second: RGB of the other end, cloud or stripe.
      seed: of what is random in it.
    """

    kind: str
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    seed: int

    def draw(self, height: int, width: int) -> np.ndarray:
        """[h, w, 3] uint8."""
        canvas = np.empty((height, width, 3), np.uint8)
        first, second = np.array(self.first, np.float32), np.array(self.second, np.float32)
        if self.kind == "flat":
            canvas[:] = self.first
            return canvas
        rng = np.random.default_rng(self.seed)
        if self.kind == "grainy":
            grain = rng.integers(-_GRAIN, _GRAIN + 1, (height, width, 1), np.int16)
            canvas[:] = np.clip(grain + np.array(self.first, np.int16), 0, 255)
            return canvas
        if self.kind == "clouded":
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8))
            share = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32) / 255
        else:
            angle = rng.uniform(0, 2 * math.pi)
            across = math.cos(angle) * np.arange(width, dtype=np.float32)
            down = math.sin(angle) * np.arange(height, dtype=np.float32)
            along = across[None, :] + down[:, None]
            if self.kind == "striped":
                share = (along / rng.uniform(4, 14) % 2 < 1).astype(np.float32)
            else:
                share = (along - along.min()) / max(float(np.ptp(along)), 1.0)
        canvas[:] = first + (second - first) * share[..., None] + 0.5
        return canvas


def random_background(rng: np.random.Generator, light: bool = False) -> Background:
    """A dark ground, or a light one on which only `vocabulary.ON_LIGHT` is seen."""
    kind = KINDS[int(np.searchsorted(np.cumsum(_CHANCES), rng.random()))]
    low, high = _LIGHT if light else _DARK
    levels = rng.integers(low, high + 1, 2).tolist()
    if kind == "striped":
        levels[1] = levels[0] + (_STRIPES if levels[0] < (low + high) / 2 else -_STRIPES)
    tints = rng.integers(-_TINT, _TINT + 1, 6).tolist()
    seed = int(rng.integers(2**31))
    colours = [min(max(levels[n // 3] + tint, 0), 255) for n, tint in enumerate(tints)]
    return Background(kind, tuple(colours[:3]), tuple(colours[3:]), seed)
