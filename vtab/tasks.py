"""The tasks as rows: VTAB-1k's nineteen (arXiv 1910.04867) and scikit-learn's digits.

Class counts come from here, never from the lists: 72 of SUN397's classes have no training image at all. Splits and
label rules are those of google-research/task_adaptation: training images are the first 800 of TensorFlow Datasets'
fixed order (train[:800]), validation images the 200 of `val`, test images all of `test`.
"""

import re
from dataclasses import dataclass

from capavision.targets import alike, near

OWN = "the source's own label"
UNCHECKED = "not checked here; the source's own terms hold"
NEAREST = "min pixel depth of the objects, cut at 8, 8.5, 9, 9.5, 10"


@dataclass(frozen=True)
class Task:
    """One row: the folder's name, its group, its classes, the size of its test split, the names others give it."""

    id: str
    group: str  # natural, specialized, structured; "extra" is not part of VTAB
    num_classes: int
    test_images: int
    paper_name: str
    source: str  # TensorFlow Datasets' name and version; a later one after |, where releases dropped the first
    val: str
    test: str = "test"
    aliases: tuple[str, ...] = ()
    label_rule: str = OWN
    licence: str = UNCHECKED
    other_test_images: tuple[int, ...] = ()  # lengths of the test split in other copies

    @property
    def names(self) -> tuple[str, ...]:
        """Every name a folder or a command may use, the canonical one first."""
        return (self.id, *self.aliases)

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """How long a whole test split may be."""
        return (self.test_images, *self.other_test_images)


_ROWS = (
    Task("cifar", "natural", 100, 10_000, "CIFAR-100", "cifar100:3.*.*", "train[45000:45200]",
         aliases=("cifar100", "cifar_100", "cifar(num_classes=100)")),
    Task("caltech101", "natural", 102, 6_085, "Caltech101", "caltech101:3.*.*", "train[2754:2954]",
         other_test_images=(6_084,)),
    Task("dtd", "natural", 47, 1_880, "DTD", "dtd:3.*.*", "validation[:200]"),
    Task("oxford_flowers102", "natural", 102, 6_149, "Flowers102", "oxford_flowers102:2.*.*", "validation[:200]",
         aliases=("flowers102",)),
    Task("oxford_iiit_pet", "natural", 37, 3_669, "Pets", "oxford_iiit_pet:3.*.*|oxford_iiit_pet:4.*.*",
         "train[2944:3144]", aliases=("oxford_pet", "pet", "pets")),
    Task("svhn", "natural", 10, 26_032, "SVHN", "svhn_cropped:3.*.*", "train[65931:66131]",
         licence="non-commercial use only (ufldl.stanford.edu/housenumbers)"),
    Task("sun397", "natural", 397, 21_750, "Sun397", "sun397/tfds:4.*.*", "validation[:200]"),
    Task("patch_camelyon", "specialized", 2, 32_768, "Camelyon", "patch_camelyon:2.*.*", "validation[:200]",
         aliases=("camelyon",), licence="CC0 (github.com/basveeling/pcam)"),
    Task("eurosat", "specialized", 10, 5_400, "EuroSAT", "eurosat/rgb:2.*.*", "train[16200:16400]", "train[21600:]"),
    Task("resisc45", "specialized", 45, 6_300, "Resisc45", "resisc45:3.*.*", "train[18900:19100]", "train[25200:]"),
    Task("diabetic_retinopathy", "specialized", 5, 42_670, "Retinopathy",
         "diabetic_retinopathy_detection/btgraham-300:3.*.*", "validation[:200]",
         aliases=("retinopathy", 'diabetic_retinopathy(config="btgraham-300")'),
         licence="Kaggle's competition terms, not checked here: do not redistribute"),
    Task("clevr_count", "structured", 8, 15_000, "Clevr-Count", "clevr:3.*.*", "train[63000:63200]", "validation",
         aliases=('clevr(task="count_all")',), label_rule="number of objects - 3"),
    Task("clevr_dist", "structured", 6, 15_000, "Clevr-Dist", "clevr:3.*.*", "train[63000:63200]", "validation",
         aliases=("clevr_distance", 'clevr(task="closest_object_distance")'), label_rule=NEAREST),
    Task("dmlab", "structured", 6, 22_735, "DMLab", "dmlab:2.*.*", "validation[:200]"),
    Task("kitti", "structured", 4, 711, "KITTI-Dist", "kitti:3.*.*", "validation[:200]",
         aliases=('kitti(task="closest_vehicle_distance")',),
         label_rule="min distance in metres of cars, vans and trucks, cut at 8 and 20; 3 where there is none"),
    Task("dsprites_loc", "structured", 16, 73_728, "dSpr-Loc", "dsprites:2.*.*", "train[589824:590024]",
         "train[663552:]", label_rule="floor(label_x_position / 2)",
         aliases=("dsprites_position", 'dsprites(predicted_attribute="label_x_position",num_classes=16)')),
    Task("dsprites_ori", "structured", 16, 73_728, "dSpr-Ori", "dsprites:2.*.*", "train[589824:590024]",
         "train[663552:]", label_rule="floor(label_orientation / 2.5)",
         aliases=("dsprites_orientation", 'dsprites(predicted_attribute="label_orientation",num_classes=16)')),
    Task("smallnorb_azi", "structured", 18, 12_150, "sNORB-Azim", "smallnorb:2.*.*", "test[:200]", "test[50%:]",
         aliases=("smallnorb_azimuth", 'smallnorb(predicted_attribute="label_azimuth")'),
         label_rule="label_azimuth", licence="research only, not to be sold (cs.nyu.edu/~ylclab/data/norb-v1.0-small)"),
    Task("smallnorb_ele", "structured", 9, 12_150, "sNORB-Ele", "smallnorb:2.*.*", "test[:200]", "test[50%:]",
         aliases=("smallnorb_elevation", 'smallnorb(predicted_attribute="label_elevation")'),
         label_rule="label_elevation",
         licence="research only, not to be sold (cs.nyu.edu/~ylclab/data/norb-v1.0-small)"),
    Task("digits", "extra", 10, 797, "digits", "", "", licence="shipped inside scikit-learn"),
)  # fmt: skip
TASKS = {task.id: task for task in _ROWS}
VTAB = tuple(task for task in _ROWS if task.group != "extra")
GROUPS = {
    group: [task.id for task in VTAB if task.group == group] for group in ("natural", "specialized", "structured")
}


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("'", '"').removeprefix("vtab-")


NAMES = {_plain(name): task for task in _ROWS for name in (*task.names, task.paper_name)}


def get(name: str) -> Task | None:
    """The row called `name`, in any of the ways that others write it; None for a name that is no task's.

    >>> get("clevr(task='count_all')").id
    'clevr_count'
    """
    return NAMES.get(_plain(name))


def find(name: str) -> Task:
    """The row called `name`, or by one of its aliases.

    Raises:
        ValueError: no such task; near names are given.

    >>> find("pets").num_classes
    37
    """
    task = get(name)
    if task is None:
        from vtab.generated import SOURCES

        hint = near(name, NAMES) if alike(name, NAMES) else f"those that need no data: {', '.join(SOURCES)}"
        raise ValueError(f"unknown task {name!r}; {hint} (your own images: --data-root FOLDER)")
    return task


def several(names: str | None) -> list[Task]:
    """The tasks of a comma-separated list; all nineteen for None or "all".

    Raises:
        ValueError: an unknown name.

    >>> [task.id for task in several("pets,clevr_distance")]
    ['oxford_iiit_pet', 'clevr_dist']
    """
    if names in (None, "all"):
        return list(VTAB)
    return list(dict.fromkeys(find(name) for name in pieces(names)))


def pieces(names: str) -> list[str]:
    """What stands between commas, but for those inside brackets.

    >>> pieces("pets, dsprites(predicted_attribute=label_x_position,num_classes=16)")
    ['pets', 'dsprites(predicted_attribute=label_x_position,num_classes=16)']
    """
    return [piece.strip() for piece in re.findall(r"(?:[^,(]|\([^)]*\))+", names) if piece.strip()]
