"""Backgrounds of muted colour (flat, shaded, clouded, striped or grainy), rendered from a few numbers."""

import dataclasses
import math

import numpy as np
from PIL import Image

KINDS = ("flat", "shaded", "clouded", "striped", "grainy")
_PROBABILITIES = (0.3, 0.2, 0.2, 0.15, 0.15)  # of each of `KINDS`
_DARK, _LIGHT = (10, 88), (178, 232)
_TINT = 14  # grey levels by which a channel may differ from the others
_STRIPES = 22  # maximum difference in grey levels between two stripes
_GRAIN = 14


@dataclasses.dataclass(frozen=True)
class Background:
    """Parameters of a background.

    Attributes:
      kind: One of `KINDS`.
      first_colour: RGB. The only colour of a flat background.
      second_colour: RGB of the other end, cloud or stripe.
      seed: Seed of the background's random texture.
    """

    kind: str
    first_colour: tuple[int, int, int]
    second_colour: tuple[int, int, int]
    seed: int

    def render(self, height: int, width: int) -> np.ndarray:
        """Returns the background as [height, width, 3] uint8."""
        if self.kind == "flat":
            return np.full((height, width, 3), self.first_colour, np.uint8)
        first, second = np.array(self.first_colour, np.float32), np.array(self.second_colour, np.float32)
        rng = np.random.default_rng(self.seed)
        if self.kind == "grainy":
            grain = rng.integers(-_GRAIN, _GRAIN + 1, (height, width, 1), np.int16)
            return np.clip(grain + first, 0, 255).astype(np.uint8)
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
        return (first + (second - first) * share[..., None] + 0.5).astype(np.uint8)


def random_background(rng: np.random.Generator, light: bool = False) -> Background:
    """Samples a dark background, or a light one on which only the colours `vocabulary.VISIBLE_ON_LIGHT` are visible."""
    kind = KINDS[int(np.searchsorted(np.cumsum(_PROBABILITIES), rng.random()))]
    low, high = _LIGHT if light else _DARK
    levels = rng.integers(low, high + 1, 2).tolist()
    if kind == "striped":
        levels[1] = levels[0] + (_STRIPES if levels[0] < (low + high) / 2 else -_STRIPES)
    tints = rng.integers(-_TINT, _TINT + 1, 6).tolist()
    seed = int(rng.integers(2**31))
    channels = [min(max(levels[n // 3] + tint, 0), 255) for n, tint in enumerate(tints)]
    return Background(kind, tuple(channels[:3]), tuple(channels[3:]), seed)
