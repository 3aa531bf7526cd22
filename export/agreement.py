"""Does preprocessing in the graph decide as Pillow's does? python -m export.agreement DIR

Over images that need no download, of random sizes and shapes: crops of scikit-learn's two photographs, its digits and
dSprites-like drawings scaled.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from export import cli, splits
from export.runtime import Classifier, check_files

SIDES = (8, 1000)  # drawn evenly on a logarithmic scale
Draw = Callable[[np.random.Generator], Image.Image]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Classify every image both ways, print and return how often the top-1 is the same.

    Raises:
        ValueError: the package has no preprocess graph.
    """
    parser = cli.Parser(prog="python -m export.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, metavar="DIR", help="what python -m export --preprocess wrote")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="(default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sizes and crops (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    cli.at_least(1, args, "images")
    cli.at_least(0, args, "seed")
    runtime = Classifier(args.package)
    runtime.pixels()  # or it is refused
    session = opened(args.package, runtime.manifest)
    rng, sources = np.random.default_rng(args.seed), builtin()
    images = (sources[i % len(sources)](rng) for i in range(args.images))
    found = [both(runtime, session, image) for image in images]
    result = figures(np.stack([p for p, _ in found]), np.stack([p for _, p in found]))
    print(
        f"{result['top1']:.2f} % of {result['images']} images get the same top-1; probabilities differ by "
        f"{result['median_difference']:.1e} (median), {result['largest_difference']:.1e} (largest)"
    )
    if args.json:
        cli.write_json(args.json, result)
    return result


def opened(folder: Path, manifest: dict[str, Any]) -> onnxruntime.InferenceSession:
    """The preprocess graph, on the CPU.

    Raises:
        ValueError: the package has none, or it was changed.
    """
    if "preprocess" not in manifest["graphs"]:
        raise ValueError(f"{folder} has no graph that preprocesses; export it with --preprocess")
    name = manifest["graphs"]["preprocess"]
    check_files(folder, manifest, but=manifest["files"].keys() - {name, f"{name}.data"})
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])


def both(
    runtime: Classifier, session: onnxruntime.InferenceSession, image: Image.Image
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (classes) by Pillow and model.onnx, and by the preprocess graph."""
    logits = runtime.logits(runtime.preprocess(image)[None])[0].astype(np.float64)
    exponent = np.exp(logits - logits.max())
    given = {"image": np.asarray(image.convert("RGB"))}
    inside = session.run(["probabilities"], given, runtime.run_options())[0][0]
    return exponent / exponent.sum(), inside


def figures(pillow: np.ndarray, graph: np.ndarray) -> dict[str, Any]:
    """How far two sets of probabilities (n, classes) agree.

    >>> figures(np.array([[0.9, 0.1], [0.5, 0.5]]), np.array([[0.8, 0.2], [0.4, 0.6]]))["top1"]
    50.0
    """
    differences = np.abs(pillow - graph).max(1)
    return {
        "images": len(pillow),
        "top1": 100 * float((pillow.argmax(1) == graph.argmax(1)).mean()),
        "median_difference": float(np.median(differences)),
        "largest_difference": float(differences.max()),
    }


def builtin() -> list[Draw]:
    """Sources of images, to be drawn from with a generator."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]

    def crop(rng: np.random.Generator) -> Image.Image:
        whole = photographs[rng.integers(len(photographs))]
        width, height = (min(side, most) for side, most in zip(_shape(rng), whole.size, strict=True))
        left, top = int(rng.integers(whole.width - width + 1)), int(rng.integers(whole.height - height + 1))
        return whole.crop((left, top, left + width, top + height))

    return [crop, *(_scaled(task) for task in ("digits", "dsprites_loc"))]


def _scaled(task: str) -> Draw:
    split = splits.open_data({}, task, None).splits["test"]
    return lambda rng: split.read(int(rng.integers(len(split)))).resize(_shape(rng), Image.Resampling.BILINEAR)


def _shape(rng: np.random.Generator) -> tuple[int, int]:
    low, high = np.log(SIDES)
    width, height = np.exp(rng.uniform(low, high, size=2))
    return int(width), int(height)


if __name__ == "__main__":
    cli.run(main)
