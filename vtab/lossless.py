"""The lossless copy: VTAB-1k's splits and label rules applied to TensorFlow Datasets, written as PNG.

Splits and labels follow google-research/task_adaptation/data. Needs pip install "capavision[tfds]". TensorFlow
Datasets downloads and prepares the sources first, into $TFDS_DATA_DIR or ~/tensorflow_datasets; resisc45 and
diabetic_retinopathy have to be placed there by hand, as its message then tells.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vtab import lists
from vtab.data import side_by_side
from vtab.tasks import Task

Example = dict[str, Any]
CLEVR_DEPTHS = (0, 8, 8.5, 9, 9.5, 10, 100)
KITTI_METRES = (-100, 8, 20, 999)
VEHICLES = 3  # KITTI's types 0, 1, 2 are car, van, truck


def _bin(value: float, thresholds: tuple[float, ...]) -> int:
    """The largest i with thresholds[i] < value.

    >>> _bin(8.0, CLEVR_DEPTHS), _bin(8.1, CLEVR_DEPTHS)
    (0, 1)
    """
    return int(np.flatnonzero(np.asarray(thresholds) < value).max())


def clevr_count(example: Example) -> int:
    """3 … 10 objects to 0 … 7."""
    return len(example["objects"]["size"]) - 3


def clevr_dist(example: Example) -> int:
    """The class of the nearest object's depth."""
    return _bin(np.min(example["objects"]["pixel_coords"][:, 2]), CLEVR_DEPTHS)


def kitti(example: Example) -> int:
    """The class of the nearest vehicle's distance; 3 if there is none."""
    objects = example["objects"]
    distances = np.asarray(objects["location"]).reshape(-1, 3)[np.asarray(objects["type"]) < VEHICLES, 2]
    return _bin(min([*distances.tolist(), 1000.0]), KITTI_METRES)


def dsprites_loc(example: Example) -> int:
    """32 columns to 16."""
    return int(example["label_x_position"]) // 2


def dsprites_ori(example: Example) -> int:
    """40 orientations to 16."""
    return int(example["label_orientation"] / 2.5)


LABELS: dict[str, Callable[[Example], int]] = {
    "clevr_count": clevr_count,
    "clevr_dist": clevr_dist,
    "kitti": kitti,
    "dsprites_loc": dsprites_loc,
    "dsprites_ori": dsprites_ori,
    "smallnorb_azi": lambda example: int(example["label_azimuth"]),
    "smallnorb_ele": lambda example: int(example["label_elevation"]),
}


def label(task: Task, example: Example) -> int:
    """VTAB's label of an example of the task's source."""
    return LABELS[task.id](example) if task.id in LABELS else int(example["label"])


def pixels(task: Task, example: Example) -> np.ndarray:
    """The example's image as uint8 (H, W, 3); dSprites' zeros and ones become black and white."""
    image = np.asarray(example["image"])
    image = image * np.uint8(255) if task.source.startswith("dsprites") else image
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]


def splits(task: Task) -> dict[str, str]:
    """TensorFlow Datasets' slices for each list; both for the 1,000, in that order."""
    train = "train[:800]"
    return {"train": train, "val": task.val, "trainval": f"{train}+{task.val}", "test": task.test}


def fill(folder: Path, task: Task) -> None:
    """Write a task's images and lists.

    Raises:
        ValueError: TensorFlow Datasets is absent, or cannot prepare the source.
    """
    builder = _builder(task)
    with tqdm(unit="img", desc=task.id, mininterval=0.5) as bar:
        for name, wanted in splits(task).items():
            _write(folder, Path(lists.LISTS[name]).stem, task, _examples(builder, wanted), bar)
    lists.mark(folder, f"tfds {builder.info.full_name}", "lossless")


def _builder(task: Task) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f'--source tfds needs TensorFlow Datasets ({error}): pip install "capavision[tfds]"'
        ) from error
    *others, last = task.source.split("|")
    for source in (*others, last):
        try:
            builder = tfds.builder(source)
            builder.download_and_prepare()
            return builder
        except Exception as error:  # of its downloads, checksums, manual folders and versions: all the user's to mend
            if source == last:
                why = " ".join(str(error).split())[:500]
                raise ValueError(f"TensorFlow Datasets cannot prepare {source} for {task.id}: {why}") from error


def _examples(builder: Any, wanted: str) -> Iterable[Example]:
    import tensorflow_datasets as tfds

    # one shard after another: the order in which slices are counted
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    found: Iterable[Example] = tfds.as_numpy(builder.as_dataset(split=wanted, shuffle_files=False, read_config=config))
    return found


def _write(folder: Path, stem: str, task: Task, examples: Iterable[Example], bar: Any) -> None:
    (folder / "images" / stem).mkdir(parents=True)

    def save(numbered: tuple[int, Example]) -> str:
        number, example = numbered
        name = f"images/{stem}/{number:06d}.png"
        Image.fromarray(pixels(task, example)).save(folder / name)
        return f"{name} {label(task, example)}\n"

    lines: Iterator[str] = side_by_side(save, enumerate(examples), ahead=64)
    with (folder / f"{stem}.txt").open("w") as file:
        for line in lines:
            file.write(line)
            bar.update()
