"""Tasks that need no download: dSprites-like images, drawn here, and scikit-learn's digits.

dSprites-like (procedural) stands in for dSprites (github.com/google-deepmind/dsprites-dataset): the same latents (3
shapes, 6 scales, 40 orientations, 32 × 32 positions), the same ids, the labels of VTAB's two tasks, but our own
pixels, so its accuracies are not dSprites accuracies and every record says so. The order is a fixed permutation of the
ids, cut as VTAB cuts: 80 % train, 10 % val, 10 % test; the first 800 and 200 of the first two, all of the third.
"""

import functools
import hashlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from capavision.masks import stream
from vtab.data import Data, Split

VERSION = 1  # of the drawing and of the order; change it with either
SIDE, SUPER = 64, 4
SHAPES, SCALES, ANGLES, PLACES = 3, 6, 40, 32
COUNT = SHAPES * SCALES * ANGLES * PLACES * PLACES
RADIUS = 12  # every shape stays this close to its centre, in pixels at scale 1


def latents(index: int) -> tuple[int, int, int, int, int]:
    """(shape, scale, orientation, x, y) of dSprites' id; y varies fastest.

    >>> latents(33)
    (0, 0, 0, 1, 1)
    """
    rest, y = divmod(index, PLACES)
    rest, x = divmod(rest, PLACES)
    rest, angle = divmod(rest, ANGLES)
    shape, scale = divmod(rest, SCALES)
    return shape, scale, angle, x, y


@functools.cache
def _outline(shape: int) -> np.ndarray:
    """The shape's boundary as points (n, 2) within the unit circle."""
    if shape == 0:
        return np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * 2**-0.5
    t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    if shape == 1:
        return np.stack([np.cos(t), 0.5 * np.sin(t)], 1)
    heart = np.stack(
        [16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], 1
    )
    return heart / np.linalg.norm(heart, axis=1).max()


def draw(index: int) -> Image.Image:
    """The sprite with this id: 64 × 64, black and white, no noise."""
    shape, scale, angle, x, y = latents(index)
    turn = 2 * np.pi * angle / (ANGLES - 1)  # both ends included, as in dSprites: 0 and 39 look the same
    size = RADIUS * (0.5 + 0.5 * scale / (SCALES - 1))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    centre = 16 + 31 * np.array([x, y]) / (PLACES - 1)
    points = (_outline(shape) @ rotation.T * size + centre) * SUPER
    canvas = Image.new("L", (SIDE * SUPER, SIDE * SUPER))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points], fill=255)
    small = canvas.resize((SIDE, SIDE), Image.Resampling.BOX)
    return small.point(lambda value: 255 * (value >= 128))


def location(index: int) -> int:
    """VTAB's label of dsprites_loc: the x position in 16 columns."""
    return latents(index)[3] // 2


def orientation(index: int) -> int:
    """VTAB's label of dsprites_ori: the 40 orientations in 16 classes, ⌊o / 2.5⌋."""
    return int(latents(index)[2] // 2.5)


def sprites(task: str, label: Callable[[int], int], names: list[str]) -> Data:
    """A dSprites-like task."""
    order = np.argsort(stream(f"dsprites-like/{VERSION}", COUNT), kind="stable")
    train, test = order[: int(0.8 * COUNT)], order[int(0.9 * COUNT) :]
    val = order[len(train) : len(order) - len(test)]
    ids = {"train": train[:800], "val": val[:200], "trainval": np.r_[train[:800], val[:200]], "test": test}
    splits = {name: _sprite_split(chosen, label) for name, chosen in ids.items()}
    facts = {"generated": True, "variant": "generated"}
    return Data(task, names, splits, f"dSprites-like (procedural), version {VERSION}", facts)


def _sprite_split(ids: np.ndarray, label: Callable[[int], int]) -> Split:
    labels = np.array([label(int(i)) for i in ids])
    identity = hashlib.sha256(f"dsprites-like/{VERSION}".encode() + ids.tobytes()).hexdigest()
    return Split(labels, lambda i: draw(int(ids[i])), [f"sprite {i}" for i in ids], lambda: identity)


def digits(seed: int = 0) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8 × 8: a stratified 800 / 200 / 797."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    everything = np.arange(len(images))
    trainval, test = train_test_split(everything, train_size=1000, stratify=bunch.target, random_state=seed)
    train, val = train_test_split(trainval, train_size=800, stratify=bunch.target[trainval], random_state=seed)
    ids = {"train": train, "val": val, "trainval": np.r_[train, val], "test": test}
    splits = {
        name: Split(
            bunch.target[chosen].astype(np.int64),
            lambda i, chosen=chosen: Image.fromarray(images[chosen[i]]),
            [f"digit {i}" for i in chosen],
        )
        for name, chosen in ids.items()
    }
    facts = {"generated": False, "variant": "lossless", "split_seed": seed}
    return Data("digits", [str(d) for d in range(10)], splits, "scikit-learn digits", facts)


SOURCES: dict[str, Callable[[], Data]] = {
    "dsprites_loc": lambda: sprites("dsprites_loc", location, [f"column {i}" for i in range(16)]),
    "dsprites_ori": lambda: sprites("dsprites_ori", orientation, [f"turn {i}/16" for i in range(16)]),
    "digits": digits,
}
