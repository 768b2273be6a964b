"""The random choices that the tasks have in common: sizes, names, colours, positions, sprites and backgrounds."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from data_pipelines.synthetic.backgrounds import Background, random_background
from data_pipelines.synthetic.image_pool import ImagePool
from data_pipelines.synthetic.scenes import PlacedObject, Scene, SyntheticVideo, Track
from data_pipelines.synthetic.sprites import Sprite, make_sprite
from data_pipelines.synthetic.vocabulary import COLOURS, KINDS, NAMES, VISIBLE_ON_LIGHT

Item = TypeVar("Item")
Region = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels
Look = tuple[str, str, str]  # kind, name and colour of an object
CELL = 28  # pixels: two patches, the block that a merged token covers
READABLE = 22  # minimum length in pixels of the longer side of a digit or a piece of clothing

Sizes = tuple[int, int, Sequence[tuple[int, int]]]  # smallest and largest side, preferred pairs of height and width
# Sides that are multiples of two patches are never resampled, so most images have such sides.
SMALL: Sizes = (56, 98, ((56, 56), (56, 56), (56, 56), (56, 84), (84, 56), (84, 84)))
LARGE: Sizes = (
    84,
    126,
    ((56, 84), (84, 56), (84, 84), (84, 84), (56, 112), (112, 56), (84, 112), (112, 84), (112, 112)),
)
VIDEO: Sizes = (56, 84, ((56, 56), (56, 56), (56, 84), (84, 56), (84, 84)))
_EXACT = 0.75  # share of preferred sizes
_LIGHT = 0.35  # share of light backgrounds where the colours allow one
_NOISY = 0.3  # share of videos with camera noise, in which the frame pruner finds nothing to remove


class SceneSampler:
    """Makes the random choices of one sample.

    Attributes:
      rng: The random generator. The order in which it is used determines the sample.
      image_pool: Source images.
      split: Name of the split; source images of the training split are augmented.
    """

    def __init__(self, rng: np.random.Generator, image_pool: ImagePool, split: str):
        self.rng, self.image_pool, self.split = rng, image_pool, split

    def choice(self, items: Sequence[Item]) -> Item:
        """Returns one of the items, all equally likely."""
        return items[int(self.rng.random() * len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """Returns `count` different items in random order."""
        if count > len(items):
            raise ValueError(f"{count} of {len(items)}")
        return [items[index] for index in self.rng.permutation(len(items))[:count].tolist()]

    def integer(self, low: float, high: float) -> int:
        """Returns a random integer from `low` to `high`, both rounded and included; `low` if `high` is smaller."""
        low = round(low)
        # One draw whatever the range, so that images of another size change the sizes alone.
        return low + int(self.rng.random() * (max(round(high), low) - low + 1))

    def bernoulli(self, probability: float) -> bool:
        """Returns True with this probability."""
        return bool(self.rng.random() < probability)

    def kind_and_name(self, kinds: Sequence[str] = KINDS) -> tuple[str, str]:
        """Returns a random kind and a random name of it; kinds are equally likely, and so are the names of each."""
        kind = self.choice(kinds)
        return kind, self.choice(NAMES[kind])

    def distinct_names(self, count: int, kinds: Sequence[str] = KINDS) -> list[tuple[str, str]]:
        """Returns `count` pairs of kind and name, no two equal."""
        pairs: list[tuple[str, str]] = []
        while len(pairs) < count:
            pair = self.kind_and_name(kinds)
            if pair not in pairs:
                pairs.append(pair)
        return pairs

    def colour(self) -> str:
        """Returns the name of a random colour."""
        return self.choice(tuple(COLOURS))

    def distinct_colours(self, count: int) -> list[str]:
        """Returns the names of `count` different colours."""
        return self.sample(tuple(COLOURS), count)

    def distinct_looks(self, count: int) -> list[Look]:
        """Returns `count` looks with different names and different colours."""
        pairs = zip(self.distinct_names(count), self.distinct_colours(count), strict=True)
        return [(kind, name, colour) for (kind, name), colour in pairs]

    def sprite(self, kind: str, name: str, colour: str, side: float) -> Sprite:
        """Makes a sprite with `make_sprite`, enlarging those too small to be recognised."""
        smallest = 12 if kind == "shape" else READABLE
        return make_sprite(
            self.rng, self.image_pool, kind, name, colour, max(int(side), smallest), self.split == "train"
        )

    def size(self, sizes: Sizes) -> tuple[int, int]:
        """Returns a random height and width: of images of one object (`SMALL`) or several (`LARGE`), or of videos."""
        low, high, pairs = sizes
        if self.bernoulli(_EXACT):
            return self.choice(pairs)
        return self.integer(low, high), self.integer(low, high)

    def place_object(self, sprite: Sprite, region: Region) -> PlacedObject:
        """Puts a sprite at a random position in a region, or in its upper left corner if the sprite is too large."""
        x0, y0, x1, y1 = region
        return PlacedObject(sprite, self.integer(x0, x1 - sprite.width), self.integer(y0, y1 - sprite.height))

    def fill(self, region: Region, look: Look, low: float, high: float = 1.0) -> PlacedObject:
        """Makes an object of a random length at a random position in a region.

        Args:
          region: Where it is put.
          look: Its kind, name and colour.
          low: Smallest length, as a share of the largest.
          high: Largest length of the longer side, as a share of the region's shorter side; 2 pixels of it stay free.
        """
        available = min(region[2] - region[0], region[3] - region[1]) * high - 2
        return self.place_object(self.sprite(*look, self.integer(low * available, available)), region)

    def halves(self, height: int, width: int) -> list[Region]:
        """Splits the longer side in two (a random one of equal sides); returns both halves in reading order."""
        if width > height or (width == height and self.bernoulli(0.5)):
            return [(0, 0, width // 2, height), (width // 2, 0, width, height)]
        return [(0, 0, width, height // 2), (0, height // 2, width, height)]

    def cells(self, count: int, height: int, width: int) -> list[Region]:
        """Returns `count` different random cells of a grid whose cells are at least `CELL` pixels per side."""
        rows, columns = height // CELL, width // CELL
        chosen = self.sample(range(rows * columns), count)
        return [
            (
                number % columns * width // columns,
                number // columns * height // rows,
                (number % columns + 1) * width // columns,
                (number // columns + 1) * height // rows,
            )
            for number in chosen
        ]

    def scene(self, height: int, width: int, *objects: PlacedObject) -> Scene:
        """Makes an image with a random background on which the objects' colours are visible."""
        return Scene(height, width, self._background([placed.sprite for placed in objects]), objects)

    def video(
        self, height: int, width: int, num_frames: int, *tracks: Track, noise_probability: float = _NOISY
    ) -> SyntheticVideo:
        """Makes a video with a random background on which the objects' colours are visible, with or without noise."""
        seed = int(self.rng.integers(2**31)) if self.bernoulli(noise_probability) else None
        background = self._background([track.sprite for track in tracks])
        return SyntheticVideo(height, width, num_frames, background, tracks, seed)

    def _background(self, sprites: Sequence[Sprite]) -> Background:
        light_allowed = bool(sprites) and all(sprite.colour in VISIBLE_ON_LIGHT for sprite in sprites)
        return random_background(self.rng, light=light_allowed and self.bernoulli(_LIGHT))
