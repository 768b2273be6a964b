"""What all tasks draw from: a random generator, the bank of pictures, and common choices made with them."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from data_pipelines.synthetic.backgrounds import random_background
from data_pipelines.synthetic.image_pool import ImagePool
from data_pipelines.synthetic.scenes import PlacedObject, Scene, SyntheticVideo, Track
from data_pipelines.synthetic.sprites import Sprite, make_sprite
from data_pipelines.synthetic.vocabulary import COLOURS, KINDS, NAMES, ON_LIGHT

Item = TypeVar("Item")
Region = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels
CELL = 28  # pixels: two patches, the block that a merged token sees
READABLE = 22  # pixels that the longer side of a real picture has at least

# Height and width. Sides that two patches divide are never resampled, so most pictures have such.
_SMALL = ((56, 56), (56, 56), (56, 56), (56, 84), (84, 56), (84, 84))
_LARGE = ((56, 84), (84, 56), (84, 84), (84, 84), (56, 112), (112, 56), (84, 112), (112, 84), (112, 112))
_CLIP = ((56, 56), (56, 56), (56, 84), (84, 56), (84, 84))
_EXACT = 0.75  # share of sizes from the tables above
_LIGHT = 0.35  # share of light grounds where the colours allow one
_NOISY = 0.3  # share of clips with a noisy camera, which leaves the frame pruner nothing


class SceneSampler:
    """Everything random in one sample.

    Attributes:
      rng: consumed in a fixed order.
      bank: pictures.
      split: name of the split; training pictures are varied in form.
    """

    def __init__(self, rng: np.random.Generator, image_pool: ImagePool, split: str):
        self.rng, self.image_pool, self.split = rng, image_pool, split

    def pick(self, items: Sequence[Item]) -> Item:
        """One of them, all equally likely."""
        return items[int(self.rng.random() * len(items))]

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """So many different ones, in random order."""
        if count > len(items):
            raise ValueError(f"{count} of {len(items)}")
        return [items[place] for place in self.rng.permutation(len(items))[:count].tolist()]

    def between(self, low: float, high: float) -> int:
        """A whole number, both ends included; the lower one if they are crossed."""
        low = round(low)
        # One draw whatever the range: sizes of pictures then change nothing but themselves.
        return low + int(self.rng.random() * (max(round(high), low) - low + 1))

    def chance(self, share: float) -> bool:
        """True so often."""
        return bool(self.rng.random() < share)

    def kind_and_name(self, kinds: Sequence[str] = KINDS) -> tuple[str, str]:
        """Kinds are equally likely, and so are the names of each."""
        kind = self.pick(kinds)
        return kind, self.pick(NAMES[kind])

    def different(self, count: int, kinds: Sequence[str] = KINDS) -> list[tuple[str, str]]:
        """So many kinds and names, no name twice."""
        found: list[tuple[str, str]] = []
        while len(found) < count:
            one = self.kind_and_name(kinds)
            if one not in found:
                found.append(one)
        return found

    def colours(self, count: int) -> list[str]:
        """Different ones."""
        return self.some(list(COLOURS), count)

    def sprite(self, kind: str, name: str, colour: str, side: float) -> Sprite:
        """See `make_sprite`; real pictures are never too small to be read."""
        smallest = 12 if kind == "shape" else READABLE
        return make_sprite(
            self.rng, self.image_pool, kind, name, colour, max(int(side), smallest), self.split == "train"
        )

    def small_size(self) -> tuple[int, int]:
        """Height and width of a picture of one thing."""
        return self._size(_SMALL, 56, 98)

    def large_size(self) -> tuple[int, int]:
        """Of a picture of several."""
        return self._size(_LARGE, 3 * CELL, 126)

    def clip_size(self) -> tuple[int, int]:
        """Of a clip."""
        return self._size(_CLIP, 56, 84)

    def placed(self, sprite: Sprite, region: Region) -> PlacedObject:
        """Anywhere in a region, or in its corner if too large."""
        x0, y0, x1, y1 = region
        return PlacedObject(sprite, self.between(x0, x1 - sprite.width), self.between(y0, y1 - sprite.height))

    def halves(self, height: int, width: int) -> list[Region]:
        """Two regions side by side along the longer side (either of equal ones), in reading order."""
        if width > height or (width == height and self.chance(0.5)):
            return [(0, 0, width // 2, height), (width // 2, 0, width, height)]
        return [(0, 0, width, height // 2), (0, height // 2, width, height)]

    def cells(self, count: int, height: int, width: int) -> list[Region]:
        """So many different cells of a grid whose cells are `CELL` pixels or a little more each way."""
        rows, columns = height // CELL, width // CELL
        chosen = self.some(range(rows * columns), count)
        return [
            (
                number % columns * width // columns,
                number // columns * height // rows,
                (number % columns + 1) * width // columns,
                (number // columns + 1) * height // rows,
            )
            for number in chosen
        ]

    def scene(self, height: int, width: int, *placed: PlacedObject) -> Scene:
        """On a ground that the colours are seen on."""
        return Scene(height, width, self._ground([one.sprite for one in placed]), placed)

    def clip(self, height: int, width: int, frames: int, *tracks: Track, noisy: float = _NOISY) -> SyntheticVideo:
        """The same; `noisy` is the chance of a noisy camera."""
        seed = int(self.rng.integers(2**31)) if self.chance(noisy) else None
        return SyntheticVideo(height, width, frames, self._ground([track.sprite for track in tracks]), tracks, seed)

    def _ground(self, sprites: Sequence[Sprite]):
        on_light = bool(sprites) and all(sprite.colour in ON_LIGHT for sprite in sprites)
        return random_background(self.rng, light=on_light and self.chance(_LIGHT))

    def _size(self, exact: Sequence[tuple[int, int]], low: int, high: int) -> tuple[int, int]:
        if self.chance(_EXACT):
            return self.pick(exact)
        return self.between(low, high), self.between(low, high)
