"""A trained run as the exporter sees it: an adapter file, what it says of itself, its model, and how that is traced."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import capavision as cv
from capavision.targets import near
from export import sizes
from export.graph import to_onnx
from export.pixels import FILE, colors, side
from export.runtime import Classifier, Runtime
from export.shape import fits

ADAPTER = "adapter.safetensors"  # in a run folder
SQUASH = "squash, bicubic"  # the one way in which a package resizes


@dataclasses.dataclass(frozen=True)
class Source:
    """An adapter file as the exporter sees it: its path, what it says of itself, and its model.

    This one takes images; `export.text_source.TextSource` and `export.question_source.QuestionSource`, which override
    what differs, take texts and questions.
    """

    kind: ClassVar[str] = "image"
    opens: ClassVar[type[Runtime]] = Classifier  # the package
    variants: ClassVar[tuple[str, ...]] = ("int8", "int8-static", "float16", "preprocess")
    path: Path
    about: dict[str, Any]
    model: nn.Module

    @classmethod
    def open(cls, path: Path) -> "Source":
        """A run folder or an adapter file.

        Raises:
            ValueError: no finished run, or a file that does not load.
        """
        if not path.exists():
            raise ValueError(f"{path} is not there; {_near(path)}")
        file = path / ADAPTER if path.is_dir() else path
        if not file.is_file():
            raise ValueError(_unfinished(path))
        about = cv.describe(file)
        if "text" in about.get("info", {}):
            from export.text_source import source_of

            return source_of(file, about)
        _check_described(file, about)
        return cls(file, about, cv.load(file).float().eval())

    @property
    def task(self) -> str:
        """The task's name: the file's own word, else that of its folder or of the file."""
        named = self.about.get("info", {}).get("task")
        if isinstance(named, str) and named:
            return named
        return self.path.absolute().parent.name if self.path.name == ADAPTER else self.path.stem

    @property
    def labels(self) -> dict[str, str]:
        """Class index as text -> name."""
        return {str(i): name for i, name in enumerate(self.about["classes"])}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """size, mean, std."""
        found: dict[str, Any] = self.about["info"]["preprocessing"]
        return found

    @property
    def base(self) -> dict[str, Any] | None:
        """What the manifest says of the model underneath."""
        found: dict[str, Any] | None = self.about["base"]
        return found

    @property
    def architecture(self) -> str | None:
        """Its name."""
        return self.about["base"]["model"] if self.about["base"] else None

    @property
    def builder(self) -> dict[str, str]:
        """Versions of what the model is made of."""
        import timm

        return {"timm": timm.__version__}

    @property
    def input(self) -> dict[str, Any]:
        """What the manifest says of the input; nothing of an image, which has preprocessor_config.json."""
        return {}

    @property
    def regression(self) -> dict[str, bool]:
        """What the manifest says of a task whose answer is a number."""
        return {}

    def write_input(self, folder: Path) -> None:
        """Write the files that say how the input is made."""
        write_json(folder / FILE, _preprocessor(self.preprocessing))

    def traced(
        self, model: nn.Module, opset: int | None = None, *, exporter: str | None = None, dynamic_size: bool = False
    ) -> onnx.ModelProto:
        """The graph of `model`: this source's own, folded or without its deltas.

        Raises:
            ValueError: what `export.graph.to_onnx` refuses, a size that is not free.
        """
        size = self.preprocessing["size"]
        if dynamic_size:
            sizes.refuse_fixed(self.model, size)
        return to_onnx(model, size, self.labels, opset, exporter=exporter, dynamic_size=dynamic_size)

    def compared(self, runtime: Runtime, tolerance: float, dynamic_size: bool) -> dict[str, Any]:
        """What is to be compared besides parity, for the manifest.

        Raises:
            ValueError: a difference above `tolerance`.
        """
        if not dynamic_size:
            return {}
        graph = runtime.folder / "model.onnx"
        return {"dynamic_size": sizes.compare(graph, self.model, self.preprocessing["size"], tolerance)}

    def example(self, batch: int, length: int) -> dict[str, Tensor]:
        """An input to time the model with: a batch of normalised images, or of texts of `length` tokens."""
        size = self.preprocessing["size"]
        pixels = np.random.default_rng(0).standard_normal((batch, 3, size, size), np.float32)
        return {"pixel_values": torch.from_numpy(pixels)}


def _near(path: Path) -> str:
    """The runs and adapter files in the nearest folder that there is."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    there = [p.name for p in folder.iterdir() if p.suffix == ".safetensors" or (p / ADAPTER).is_file()]
    return f"in {folder}, {near(path.absolute().relative_to(folder).parts[0], there)}"


def _unfinished(folder: Path) -> str:
    """Why there is nothing to export in a folder without an adapter file."""
    if (folder / "config.json").is_file():
        return f"{folder} holds no {ADAPTER}; finish the run first, or name an adapter file"
    if runs := sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER}")):
        return f"{folder} holds runs: {', '.join(runs[:3])}{' …' if len(runs) > 3 else ''}; name one"
    return f"{folder} is no run's folder: it holds no {ADAPTER}, and no config.json"


def _check_described(file: Path, about: dict[str, Any]) -> None:
    """Raise ValueError, with what to save, unless the file has its classes and a preprocessing that a package does."""
    classes, found = about.get("classes"), about.get("info", {}).get("preprocessing")
    if classes is None or found is None:
        lacks = f"{file} does not say its {'classes' if classes is None else 'preprocessing'}"
    elif not fits(classes, [str]) or about["num_classes"] not in (None, len(classes)):
        lacks = f"{file}: its classes are no names of its {about['num_classes']} logits"
    elif not _squashes(found):
        lacks = f"{file}: its preprocessing is {found}, which no package does"
    else:
        return
    raise ValueError(
        f"{lacks}; save it with classes=['ant', …], info={{'preprocessing': {{'size': 224, 'mean': [0.5, 0.5, 0.5], "
        "'std': [0.5, 0.5, 0.5]}}: the whole image is squashed to size × size, bicubic, never cropped; a timm data "
        "config has the size in input_size[-1]"
    )


def _squashes(found: Any) -> bool:
    if not fits(found, {"size": side, "mean": colors, "std": colors}):
        return False
    return 0 not in found["std"] and found.get("resize", SQUASH) == SQUASH


def _preprocessor(preprocessing: dict[str, Any]) -> dict[str, Any]:
    size = preprocessing["size"]
    return {
        "size": {"height": size, "width": size},
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocessing["mean"],
        "image_std": preprocessing["std"],
        "do_convert_rgb": True,
    }


def write_json(path: Path, content: Any) -> None:
    """A file of a package."""
    path.write_text(json.dumps(content, indent=1))
