"""What a package of images takes: uint8 pixels, as the run's preprocessing made them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from export.images import LIMIT, Picture, decode
from export.runtime import random_pixels, read_json
from export.shape import fits, number

FILE = "preprocessor_config.json"


def side(value: Any) -> bool:
    """Of an image that may be decoded."""
    return type(value) is int and 0 < value <= LIMIT**0.5


def colors(value: Any) -> bool:
    """A number for each of red, green and blue."""
    return fits(value, [number]) and len(value) == 3


def _divisors(value: Any) -> bool:
    return colors(value) and 0 not in value


PREPROCESSOR = {
    "size": {"height": side, "width": side},
    "image_mean": colors,
    "image_std": _divisors,
    "rescale_factor": number,
    "resample": int,
}


class Pixels:
    """Images of any kind to uint8 (n, H, W, 3), and those to the graph's input.

    Args:
        folder: the package.
        manifest: its manifest, read.

    Raises:
        ValueError: preprocessor_config.json is missing or damaged.
    """

    kind, unit = "image", "pixels"
    outputs = ("logits",)

    def __init__(self, folder: Path, manifest: Any) -> None:
        self.preprocessor = read_json(folder / FILE)
        if not fits(self.preprocessor, PREPROCESSOR):
            raise ValueError(f"{folder / FILE} is damaged; export again")
        self.size: tuple[int, int] = self.preprocessor["size"]["height"], self.preprocessor["size"]["width"]
        self.any_size = "dynamic_size" in manifest

    def zeros(self) -> dict[str, np.ndarray]:
        """The smallest input that the graph takes."""
        return {"pixel_values": np.zeros((1, 3, *self.size), np.float32)}

    def sample(self, seed: int, count: int) -> np.ndarray:
        """Random images, the same on every machine."""
        return random_pixels(seed, count, self.size[0])

    def each(self, seed: int, count: int) -> Iterator[np.ndarray]:
        """The same images one by one."""
        return iter(self.sample(seed, count)[:, None])

    def check(self, images: Sequence[Picture]) -> None:
        """Raise TypeError for one image instead of a list."""
        is_array = isinstance(images, np.ndarray) and images.ndim in (2, 3)
        if is_array or isinstance(images, (str, bytes, Path, Image.Image)):
            raise TypeError(f"predict takes a list of images, and this is one {type(images).__name__}: write [image]")

    def prepare(self, images: Sequence[Picture]) -> np.ndarray:
        """Images of any kind as uint8 (n, H, W, 3).

        Raises:
            ValueError, TypeError: what `export.images.decode` refuses.
        """
        return np.stack([self.squashed(image) for image in images])

    def cut(self, images: Sequence[Picture]) -> list[int]:
        """Which of the images are not read to their end: none."""
        return []

    def shown(self, image: Picture) -> str:
        """An image's name."""
        return str(image)

    def squashed(self, image: Picture) -> np.ndarray:
        """One image as uint8 (H, W, 3): upright, RGB, squashed, as in training.

        Raises:
            ValueError, TypeError: what `export.images.decode` refuses.
        """
        height, width = self.size
        return np.asarray(decode(image).resize((width, height), Image.Resampling.BICUBIC))

    def feeds(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The graph's inputs for uint8 (n, H, W, 3).

        Raises:
            ValueError: another dtype, layout or size.
        """
        return {"pixel_values": self.normalize(pixels)}

    def joined(self, outputs: Sequence[np.ndarray], given: dict[str, np.ndarray]) -> np.ndarray:
        """The logits (n, classes) among what the graph gave."""
        return outputs[0]

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3) as the graph's pixel_values.

        Raises:
            ValueError: another dtype, layout or size.
        """
        self._check(pixels)
        mean, std = (np.array(self.preprocessor[key], np.float32) for key in ("image_mean", "image_std"))
        return ((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)

    def _check(self, pixels: np.ndarray) -> None:
        height, width = ("height", "width") if self.any_size else self.size
        is_array = isinstance(pixels, np.ndarray)
        fits = is_array and pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.size > 0 and pixels.shape[3] == 3
        if not fits or not (self.any_size or pixels.shape[1:3] == self.size):
            found = f"{pixels.dtype} {pixels.shape}" if is_array else type(pixels).__name__
            raise ValueError(
                f"pixels must be uint8 (n, {height}, {width}, 3), and are {found}; Classifier.preprocess makes such"
            )
