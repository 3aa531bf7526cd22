"""An exported package in use: numpy, pillow and onnxruntime, never torch.

model.onnx                     pixel_values float32 (batch, 3, H, W) -> logits float32 (batch, classes)
model_int8.onnx, …             variants of it, where they were asked for
adapters/<task>.onnx_adapter   of a split package: what a task puts into the slots of the base graph
config.json                    architecture, labels of the first task
preprocessor_config.json       size, mean, std
manifest.json                  checksums, tasks with labels, parity figures and a probe each, versions
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from export import session as sessions
from export.cli import first_line
from export.images import Picture, decode
from export.shape import PREPROCESSOR, fits, whole

SCHEMA = 2
TOLERANCE = 1e-4  # largest |difference| / largest |logit|
BATCH = 64  # images a run; more would only take memory


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected value: what a parity gate can hold at any scale of logits."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


def random_pixels(seed: int, count: int, size: int) -> np.ndarray:
    """Seeded uint8 images (count, size, size, 3) from Philox's raw words, the same on every machine."""
    words = np.random.Philox(key=seed).random_raw(count * size * size * 3)
    return (words >> np.uint64(56)).astype(np.uint8).reshape(count, size, size, 3)


def read_json(path: Path) -> Any:
    """A JSON file of a package.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is no exported package: {path.name} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); export again") from error


def read_manifest(folder: Path) -> Any:
    """The manifest of a package.

    Raises:
        ValueError: it is missing or damaged, or of another format; the folder is a file, or a run.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name the package's folder")
    if (folder / "adapter.safetensors").is_file() and not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} is a run; python -m export {folder} --out DIR makes a package of it")
    manifest = read_json(folder / "manifest.json")
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if type(found) is int and found != SCHEMA:
        cure = "upgrade capavision" if found > SCHEMA else "export again"
        raise ValueError(f"{folder} has format {found}, this runtime reads {SCHEMA}; {cure}")
    if type(found) is not int or not whole(manifest):
        raise ValueError(f"{folder / 'manifest.json'} is damaged; export again")
    return manifest


def check_files(folder: Path, manifest: Any, but: Collection[str] = ()) -> None:
    """Raise ValueError for a file that is missing, or not the one that was exported."""
    for name, recorded in manifest["files"].items():
        path = folder / name
        if name in but:
            continue
        if not path.is_file():
            raise ValueError(f"{path} is missing; export again")
        if sha256(path) != recorded["sha256"]:
            raise ValueError(f"{path} was changed after the export; export again")


def graph_of(folder: Path, manifest: Any, variant: str) -> str:
    """The file of a variant that takes pixels and gives logits.

    Raises:
        ValueError: there is none of that name, or it takes whole images.
    """
    graphs = manifest["graphs"]
    own = f"choose of {', '.join(name for name in graphs if name != 'preprocess')}"
    if variant not in graphs:
        raise ValueError(f"{folder} has no variant {variant!r}; {own}")
    graph: str = graphs[variant]
    if variant == "preprocess":
        raise ValueError(
            f"{folder / graph} takes image uint8 (H, W, 3) and gives probabilities, so run it in ONNX Runtime; "
            f"here {own}"
        )
    return graph


class Classifier:
    """A package, loaded: images of any kind in, labels and probabilities out. Threads may share one.

    Args:
        folder: what `python -m export` wrote.
        task: the current one, for calls that name none; None takes the package's first.
        variant: "float32", or another of the package's graphs.
        threads: of ONNX Runtime; None leaves it the choice.
        providers: "cuda", "tensorrt", "coreml", "cpu"; None takes the best that there is. `.providers` says what runs.

    Raises:
        ValueError: the folder is no package, or one of another format, or a file of it was changed; an unknown task,
            variant or provider.

    >>> classifier = Classifier("package", "pets")  # doctest: +SKIP
    >>> classifier.predict(["cat.jpg"], top=1)  # doctest: +SKIP
    [[('cat', 0.98)]]
    >>> classifier.switch("flowers")  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | Path,
        task: str | None = None,
        *,
        variant: str = "float32",
        threads: int | None = None,
        providers: Sequence[str] | None = None,
    ) -> None:
        self.folder, self.variant = Path(folder), variant
        self.manifest = read_manifest(self.folder)
        graphs, files = self.manifest["graphs"], self.manifest["files"]
        graph = graph_of(self.folder, self.manifest, variant)
        data = f"{graph}.data"
        check_files(
            self.folder, self.manifest, but={*graphs.values(), *(f"{g}.data" for g in graphs.values())} - {graph, data}
        )
        self.preprocessor = read_json(self.folder / "preprocessor_config.json")
        if not fits(self.preprocessor, PREPROCESSOR):
            raise ValueError(f"{self.folder / 'preprocessor_config.json'} is damaged; export again")
        identity = [files[name]["sha256"] for name in (graph, data) if name in files]
        size = self.preprocessor["size"]["height"]
        self.session = sessions.session(self.folder / graph, identity, size, threads, providers)
        self._adapters = self._load_adapters()
        self._task = self._known(self.tasks[0] if task is None else task)

    def _load_adapters(self) -> dict[str, onnxruntime.LoraAdapter | None]:
        tasks = self.manifest["tasks"]
        if self.manifest["form"] != "split":
            return dict.fromkeys(tasks)
        base, slots = self.manifest["base_sha256"], self.manifest["slots"]
        if self.session.get_modelmeta().custom_metadata_map.get("base_sha256") != base:
            raise ValueError(f"{self.folder} has the base graph of another package; export again")
        return {name: sessions.adapter(self.folder / task["adapter"], slots, base) for name, task in tasks.items()}

    def _known(self, task: str) -> str:
        if task not in self._adapters:
            raise ValueError(f"{self.folder} has no task {task!r}; choose of {', '.join(self.tasks)}")
        return task

    @property
    def tasks(self) -> tuple[str, ...]:
        """The package's tasks by name."""
        return tuple(self._adapters)

    @property
    def task(self) -> str:
        """The task of calls that name none."""
        return self._task

    @property
    def labels(self) -> list[str]:
        """The current task's classes, in the order of its logits."""
        return list(self.manifest["tasks"][self._task]["labels"])

    @property
    def providers(self) -> list[str]:
        """ONNX Runtime's names of the execution providers that run, by preference."""
        return list(self.session.get_providers())

    def switch(self, task: str) -> None:
        """Make `task` the current one; calls that have begun keep theirs.

        Raises:
            ValueError: the package has no such task.
        """
        self._task = self._known(task)

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3) to the graph's input.

        Raises:
            ValueError: another dtype, layout or size.
        """
        self._check(pixels)
        mean, std = (np.array(self.preprocessor[key], np.float32) for key in ("image_mean", "image_std"))
        return ((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)

    def _check(self, pixels: np.ndarray) -> None:
        size = self.session.get_inputs()[0].shape[2:]  # names, where the graph takes any
        expected = (*(n if isinstance(n, int) else None for n in size), 3)
        is_array = isinstance(pixels, np.ndarray)
        fits = is_array and pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.size > 0
        if not fits or any(n not in (None, m) for n, m in zip(expected, pixels.shape[1:], strict=True)):
            found = f"{pixels.dtype} {pixels.shape}" if is_array else type(pixels).__name__
            raise ValueError(
                f"pixels must be uint8 (n, {size[0]}, {size[1]}, 3), and are {found}; Classifier.preprocess makes such"
            )

    def preprocess(self, image: Picture) -> np.ndarray:
        """One image as uint8 (size, size, 3): upright, RGB, squashed, as in training.

        Raises:
            ValueError, TypeError: what `export.images.decode` refuses.
        """
        size = self.preprocessor["size"]["width"], self.preprocessor["size"]["height"]
        return np.asarray(decode(image).resize(size, Image.Resampling.BICUBIC))

    def logits(self, pixels: np.ndarray, task: str | None = None) -> np.ndarray:
        """Logits (n, classes) of uint8 images (n, H, W, 3), for `task` or else the current one.

        Of the variant int8 they depend on the other images too: its scales are of a whole batch.

        Raises:
            ValueError: an unknown task; pixels of another dtype, layout or size; a graph that does not run.
        """
        given, options = {"pixel_values": self.normalize(pixels)}, self.run_options(task)
        try:
            logits: np.ndarray = self.session.run(["logits"], given, options)[0]
        except Exception as error:  # onnxruntime raises classes of its own
            raise ValueError(
                f"{self.folder}: {self.variant} does not run for {task or self._task} ({first_line(error)})"
            ) from error
        return logits

    def run_options(self, task: str | None = None) -> onnxruntime.RunOptions | None:
        """What a run of the session has to be given for `task`, or else the current one: its adapter, if it has one.

        Raises:
            ValueError: an unknown task.
        """
        adapter = self._adapters[self._task if task is None else self._known(task)]
        if adapter is None:
            return None
        options = onnxruntime.RunOptions()
        options.add_active_adapter(adapter)
        return options

    def predict(
        self, images: Sequence[Picture], top: int = 5, task: str | None = None
    ) -> list[list[tuple[str, float]]]:
        """The `top` most probable labels of each image, most probable first, for `task` or else the current one.

        What an image gets depends on no other: dynamic int8, whose scales are of a whole batch, sees one at a time.

        Raises:
            ValueError: an unknown task, an image that does not decode, a `top` below 1.
            TypeError: one image instead of a list.
        """
        task = self._task if task is None else self._known(task)
        if isinstance(images, (str, bytes, Path, Image.Image)) or (
            isinstance(images, np.ndarray) and images.ndim in (2, 3)
        ):
            raise TypeError(f"predict takes a list of images, and this is one {type(images).__name__}: write [image]")
        if top < 1:
            raise ValueError(f"top={top} must be at least 1")
        count = 1 if self.variant == "int8" else BATCH
        pieces = (images[start : start + count] for start in range(0, len(images), count))
        return [row for piece in pieces for row in self._rows(piece, top, task)]

    def _rows(self, images: Sequence[Picture], top: int, task: str) -> list[list[tuple[str, float]]]:
        labels = self.manifest["tasks"][task]["labels"]
        logits = self.logits(np.stack([self.preprocess(image) for image in images]), task).astype(np.float64)
        if logits.shape[1:] != (len(labels),):
            raise ValueError(
                f"{self.folder}: {task} has logits of {logits.shape}, and {len(labels)} labels; export again"
            )
        exponent = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponent / exponent.sum(1, keepdims=True)
        best = np.argsort(-probabilities, axis=1)[:, :top]
        rows = zip(best, probabilities, strict=True)
        return [[(labels[k], float(p[k])) for k in chosen] for chosen, p in rows]
