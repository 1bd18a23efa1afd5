"""Which part of an image is shown, and at what size: decided from its size, so that every loader cuts the same."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

ATTEMPTS = 10


@dataclass(frozen=True)
class Window:
    """The region (left, top, width, height) of an image, resized to (width, height); of that, a square from a corner.

    All in pixels. size: the side of the square, (left, top) its corner in the resized region.
    """

    region: tuple[int, int, int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: int


class View(Protocol):
    """Where to look in an image of a given size."""

    @property
    def size(self) -> int:
        """The side of the square that is shown."""

    def window(self, width: int, height: int, random: np.random.Generator) -> Window:
        """The window on an image of width x height pixels."""


@dataclass(frozen=True)
class RandomArea:
    """A random region of 8 % to 125 % of the area, 3:4 to 4:3 in shape, resized to a square.

    Regions that do not fit are drawn again, ten times; after that the central one with the nearest allowed shape. The
    distribution of torchvision's RandomResizedCrop(size, scale=area). [published code: area 0.08 to 1.25]
    """

    size: int
    area: tuple[float, float] = (0.08, 1.25)
    shape: tuple[float, float] = (3 / 4, 4 / 3)

    def window(self, width: int, height: int, random: np.random.Generator) -> Window:
        """The window on an image of width x height pixels."""
        left, top, w, h = self._region(width, height, random)
        return Window((left, top, w, h), (self.size, self.size), (0, 0), self.size)

    def _region(self, width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(ATTEMPTS):
            area = width * height * random.uniform(*self.area)
            shape = math.exp(random.uniform(math.log(self.shape[0]), math.log(self.shape[1])))
            w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < w <= width and 0 < h <= height:
                return int(random.integers(width - w + 1)), int(random.integers(height - h + 1)), w, h
        shape = min(max(width / height, self.shape[0]), self.shape[1])
        w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
        return (width - w) // 2, (height - h) // 2, w, h


@dataclass(frozen=True)
class Centre:
    """The shorter side resized to `shorter`, the central square cut out, rounded as torchvision rounds."""

    size: int
    shorter: int

    def window(self, width: int, height: int, random: np.random.Generator) -> Window:
        """The window on an image of width x height pixels."""
        long = int(self.shorter * max(width, height) / min(width, height))
        w, h = (self.shorter, long) if width <= height else (long, self.shorter)
        corner = (round((w - self.size) / 2.0), round((h - self.size) / 2.0))
        return Window((0, 0, width, height), (w, h), corner, self.size)


@dataclass(frozen=True)
class Whole:
    """The whole image resized to a square."""

    size: int

    def window(self, width: int, height: int, random: np.random.Generator) -> Window:
        """The window on an image of width x height pixels."""
        return Window((0, 0, width, height), (self.size, self.size), (0, 0), self.size)


def cut(image: Image.Image, window: Window) -> np.ndarray:
    """The window on an RGB image, bilinear and antialiased: (size, size, 3) uint8, a copy."""
    left, top, width, height = window.region
    if image.size != (width, height):
        image = image.crop((left, top, left + width, top + height))
    if image.size != window.resized:
        image = image.resize(window.resized, Image.Resampling.BILINEAR)
    left, top = window.corner
    if image.size != (window.size, window.size):
        image = image.crop((left, top, left + window.size, top + window.size))
    return np.array(image)
