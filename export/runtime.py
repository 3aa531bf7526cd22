"""An exported package in use: numpy and onnxruntime, for images pillow, for texts tokenizers; never torch.

model.onnx                     pixel_values float32 (batch, 3, H, W) -> logits float32 (batch, classes)
                               or input_ids, attention_mask and perhaps token_type_ids, int64 (batch, length)
                               and of questions -> start_logits, end_logits float32 (batch, length)
model_int8.onnx, …             variants of it, where they were asked for
adapters/<task>.onnx_adapter   of a split package: what a task puts into the slots of the base graph
config.json                    architecture, labels of the first task
preprocessor_config.json       size, mean, std of images
tokenizer.json                 of texts and questions, in its place
manifest.json                  checksums, tasks with labels, parity figures and a probe each, versions
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnxruntime

from export import session as sessions
from export.cli import first_line
from export.shape import whole

if TYPE_CHECKING:
    from export.images import Picture
    from export.pixels import Pixels
    from export.questions import Questions
    from export.tokens import Text, Tokens

SCHEMA = 2
TOLERANCE = 1e-4  # largest |difference| / largest |logit|
BATCH = 64  # images or texts a run; more would only take memory


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


def kind_of(manifest: Any) -> str:
    """What a package takes: "image", "text" or "question"."""
    return str(manifest["input"]["kind"]) if "input" in manifest else "image"


def input_of(folder: Path, manifest: Any) -> "Pixels | Tokens | Questions":
    """What a package takes: the one object that knows how an image, a text or a question becomes the graph's inputs,
    and what the graph's outputs are.

    Raises:
        ValueError: its file, preprocessor_config.json or tokenizer.json, is missing or damaged.
    """
    kind = kind_of(manifest)
    if kind == "question":
        from export.questions import Questions

        return Questions(folder, manifest["input"])
    if kind == "text":
        from export.tokens import Tokens

        return Tokens(folder, manifest["input"])
    from export.pixels import Pixels

    return Pixels(folder, manifest)


class Runtime:
    """A package of any kind, loaded: what its graph takes in, logits out. Threads may share one.

    Args:
        folder: what `python -m export` wrote.
        task: the current one, for calls that name none; None takes the package's first.
        variant: "float32", or another of the package's graphs.
        threads: of ONNX Runtime; None leaves it the choice.
        providers: "cuda", "tensorrt", "coreml", "cpu"; None takes the best that there is. `.providers` says what runs.

    Raises:
        ValueError: the folder is no package, or one of another format or kind, or a file of it was changed; an unknown
            task, variant or provider.
    """

    kinds: ClassVar[tuple[str, ...]] = ("image", "text", "question")  # of packages that it opens

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
        if (kind := kind_of(self.manifest)) not in self.kinds:
            own = "export.answerer.Answerer" if kind == "question" else "export.runtime.Classifier"
            raise ValueError(f"{folder} takes {kind}s; python -m export.predict and {own} answer them")
        graphs, files = self.manifest["graphs"], self.manifest["files"]
        graph = graph_of(self.folder, self.manifest, variant)
        data = f"{graph}.data"
        check_files(
            self.folder, self.manifest, but={*graphs.values(), *(f"{g}.data" for g in graphs.values())} - {graph, data}
        )
        self.input = input_of(self.folder, self.manifest)
        identity = [files[name]["sha256"] for name in (graph, data) if name in files]
        self.session = sessions.session(self.folder / graph, identity, self.input.zeros(), threads, providers)
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
    def providers(self) -> list[str]:
        """ONNX Runtime's names of the execution providers that run, by preference."""
        return list(self.session.get_providers())

    def switch(self, task: str) -> None:
        """Make `task` the current one; calls that have begun keep theirs.

        Raises:
            ValueError: the package has no such task.
        """
        self._task = self._known(task)

    def pixels(self) -> "Pixels":
        """What the package takes, where that is images.

        Raises:
            ValueError: it takes something else.
        """
        if (kind := self.input.kind) != "image":
            raise ValueError(f"{self.folder} takes {kind}s, and this is for images; python -m export.predict takes all")
        return self.input  # type: ignore[return-value]

    @property
    def preprocessor(self) -> dict[str, Any]:
        """preprocessor_config.json of a package of images."""
        return self.pixels().preprocessor

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3) to the graph's input.

        Raises:
            ValueError: another dtype, layout or size; a package of texts.
        """
        return self.pixels().normalize(pixels)

    def logits(self, batch: Any, task: str | None = None) -> np.ndarray:
        """Logits (n, classes) of uint8 images (n, H, W, 3) or of tokens, for `task` or else the current one; of
        questions (n, 2, length), start and end.

        Of the variant int8 they depend on the rest of the batch too: its scales are of the whole.

        Args:
            batch: as `input.prepare` makes it.
            task: its name.

        Raises:
            ValueError: an unknown task; pixels of another dtype, layout or size; a graph that does not run.
        """
        given, options = self.input.feeds(batch), self.run_options(task)
        try:
            found = self.session.run([*self.input.outputs], given, options)
        except Exception as error:  # onnxruntime raises classes of its own
            raise ValueError(
                f"{self.folder}: {self.variant} does not run for {task or self._task} ({first_line(error)})"
            ) from error
        return self.input.joined(found, given)

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


class Classifier(Runtime):
    """A package of images or texts: images of any kind, or texts, in, labels and probabilities out. Opened as any
    `Runtime` is.

    >>> classifier = Classifier("package", "pets")  # doctest: +SKIP
    >>> classifier.predict(["cat.jpg"], top=1)  # doctest: +SKIP
    [[('cat', 0.98)]]
    >>> classifier.switch("flowers")  # doctest: +SKIP
    """

    kinds = ("image", "text")

    @property
    def labels(self) -> list[str]:
        """The current task's classes, in the order of its logits."""
        return list(self.manifest["tasks"][self._task]["labels"])

    def preprocess(self, image: "Picture") -> np.ndarray:
        """One image as uint8 (size, size, 3): upright, RGB, squashed, as in training.

        Raises:
            ValueError, TypeError: what `export.images.decode` refuses; a package of texts.
        """
        return self.pixels().squashed(image)

    def predict(
        self, items: "Sequence[Picture] | Sequence[Text]", top: int = 5, task: str | None = None
    ) -> list[list[tuple[str, float]]]:
        """The `top` most probable labels of each image or text, most probable first; `task`, or else the current one.

        What an item gets depends on no other: dynamic int8, whose scales are of a whole batch, sees one at a time. A
        text is read up to the max_length of training (`input.cut` tells which are longer). Where the task is a
        regression, its one label is "score", and the number the answer.

        Raises:
            ValueError: an unknown task, an image that does not decode, an empty text, a `top` below 1.
            TypeError: one item instead of a list, or no image, no text.
        """
        task = self._task if task is None else self._known(task)
        self.input.check(items)  # type: ignore[arg-type]
        if top < 1:
            raise ValueError(f"top={top} must be at least 1")
        count = 1 if self.variant == "int8" else BATCH
        pieces = (items[start : start + count] for start in range(0, len(items), count))
        return [row for piece in pieces for row in self._rows(piece, top, task)]

    def _rows(self, items: Any, top: int, task: str) -> list[list[tuple[str, float]]]:
        about = self.manifest["tasks"][task]
        labels = about["labels"]
        logits = self.logits(self.input.prepare(items), task).astype(np.float64)
        if logits.shape[1:] != (len(labels),):
            raise ValueError(
                f"{self.folder}: {task} has logits of {logits.shape}, and {len(labels)} labels; export again"
            )
        if about.get("regression"):
            return [[(labels[0], float(value))] for (value,) in logits]
        exponent = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponent / exponent.sum(1, keepdims=True)
        best = np.argsort(-probabilities, axis=1)[:, :top]
        rows = zip(best, probabilities, strict=True)
        return [[(labels[k], float(p[k])) for k in chosen] for chosen, p in rows]
