"""The tasks as rows: VTAB-1k's nineteen (arXiv 1910.04867) and scikit-learn's digits.

Class counts come from here, never from the lists: 72 of SUN397's classes have no training image at all.
"""

from dataclasses import dataclass

from capavision.targets import near


@dataclass(frozen=True)
class Task:
    """One row: the folder's name, its group, its classes, the size of its test split, the names others give it."""

    id: str
    group: str  # natural, specialized, structured; "extra" is not part of VTAB
    num_classes: int
    test_images: int
    aliases: tuple[str, ...] = ()


_ROWS = (
    Task("cifar", "natural", 100, 10_000, ("cifar100", "cifar_100")),
    Task("caltech101", "natural", 102, 6_085),
    Task("dtd", "natural", 47, 1_880),
    Task("oxford_flowers102", "natural", 102, 6_149, ("flowers102",)),
    Task("oxford_iiit_pet", "natural", 37, 3_669, ("oxford_pet", "pet", "pets")),
    Task("svhn", "natural", 10, 26_032),
    Task("sun397", "natural", 397, 21_750),
    Task("patch_camelyon", "specialized", 2, 32_768, ("camelyon",)),
    Task("eurosat", "specialized", 10, 5_400),
    Task("resisc45", "specialized", 45, 6_300),
    Task("diabetic_retinopathy", "specialized", 5, 42_670, ("retinopathy",)),
    Task("clevr_count", "structured", 8, 15_000),
    Task("clevr_dist", "structured", 6, 15_000, ("clevr_distance",)),
    Task("dmlab", "structured", 6, 22_735),
    Task("kitti", "structured", 4, 711),
    Task("dsprites_loc", "structured", 16, 73_728, ("dsprites_position",)),
    Task("dsprites_ori", "structured", 16, 73_728, ("dsprites_orientation",)),
    Task("smallnorb_azi", "structured", 18, 12_150, ("smallnorb_azimuth",)),
    Task("smallnorb_ele", "structured", 9, 12_150, ("smallnorb_elevation",)),
    Task("digits", "extra", 10, 797),
)
TASKS = {task.id: task for task in _ROWS}
NAMES = {alias: task for task in _ROWS for alias in (task.id, *task.aliases)}


def find(name: str) -> Task:
    """The row called `name`, or by one of its aliases.

    Raises:
        ValueError: no such task; near names are given.

    >>> find("pets").num_classes
    37
    """
    if name not in NAMES:
        raise ValueError(f"unknown task {name!r}; {near(name, NAMES)} (your own images: --data-root FOLDER)")
    return NAMES[name]
