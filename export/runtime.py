"""An exported package in use: numpy, pillow and onnxruntime, never torch.

model.onnx                 pixel_values float32 (batch, 3, H, W) -> logits float32 (batch, classes)
config.json                architecture, labels
preprocessor_config.json   size, mean, std
manifest.json              checksums, versions, parity figures, a probe with its logits
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

SCHEMA = 1
FILES = ("model.onnx", "config.json", "preprocessor_config.json")
TOLERANCE = 1e-4  # largest |difference| / largest |logit|


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
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); export again") from error


def read_manifest(folder: Path) -> Any:
    """The manifest of a package.

    Raises:
        ValueError: it is missing or damaged, or of a newer format.
    """
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or not {"schema_version", "files", "parity", "probe"} <= manifest.keys():
        raise ValueError(f"{folder / 'manifest.json'} is damaged; export again")
    if manifest["schema_version"] > SCHEMA:
        found = manifest["schema_version"]
        raise ValueError(f"{folder} has format {found}, this runtime reads up to {SCHEMA}; upgrade capavision")
    return manifest


def check_files(folder: Path, manifest: Any) -> None:
    """Raise ValueError for a file that is missing, or not the one that was exported."""
    for name in FILES:
        path, expected = folder / name, manifest["files"].get(name, {}).get("sha256")
        if not path.is_file():
            raise ValueError(f"{path} is missing; export again")
        if sha256(path) != expected:
            raise ValueError(f"{path} was changed after the export; export again")


class Classifier:
    """A package, loaded: paths or PIL images in, labels and probabilities out.

    Args:
        folder: what `python -m export` wrote.
        threads: of ONNX Runtime; None leaves it the choice.

    Raises:
        ValueError: the folder is no package, or one of a newer format, or a file of it was changed.

    >>> Classifier("package").predict(["cat.jpg"], top=1)  # doctest: +SKIP
    [[('cat', 0.98)]]
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        check_files(folder, self.manifest)
        self.labels = [label for _, label in sorted(read_json(folder / "config.json")["id2label"].items(), key=_number)]
        self.preprocessor = read_json(folder / "preprocessor_config.json")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        model = folder / "model.onnx"
        try:
            self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises classes of its own
            raise ValueError(f"{model} does not load ({str(error).splitlines()[0]}); export again") from error

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3) to the graph's input."""
        mean, std = (np.array(self.preprocessor[key], np.float32) for key in ("image_mean", "image_std"))
        return ((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)

    def preprocess(self, image: str | Path | Image.Image) -> np.ndarray:
        """One image as uint8 (size, size, 3): upright, RGB, squashed, as in training.

        Raises:
            ValueError: it does not decode.
        """
        size = self.preprocessor["size"]["height"], self.preprocessor["size"]["width"]
        try:
            opened = image if isinstance(image, Image.Image) else Image.open(image)
            upright = ImageOps.exif_transpose(opened).convert("RGB")
            return np.asarray(upright.resize(size[::-1], Image.Resampling.BICUBIC))
        except FileNotFoundError:
            raise ValueError(f"{image} is not a file") from None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{image} does not decode ({error})") from error

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Logits (n, classes) of uint8 images (n, H, W, 3)."""
        logits: np.ndarray = self.session.run(["logits"], {"pixel_values": self.normalize(pixels)})[0]
        return logits

    def predict(self, images: Sequence[str | Path | Image.Image], top: int = 5) -> list[list[tuple[str, float]]]:
        """The `top` most probable labels of each image, most probable first."""
        logits = self.logits(np.stack([self.preprocess(image) for image in images])).astype(np.float64)
        exponent = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponent / exponent.sum(1, keepdims=True)
        best = np.argsort(-probabilities, axis=1)[:, :top]
        rows = zip(best, probabilities, strict=True)
        return [[(self.labels[k], float(p[k])) for k in chosen] for chosen, p in rows]


def _number(item: tuple[str, str]) -> int:
    return int(item[0])
