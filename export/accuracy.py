"""How right is an exported package? python -m export.accuracy DIR --run RUN_DIR | --data-root PATH | --task NAME

Top-1 with its 95 % interval on the split that the run was judged on, beside what PyTorch had there. The splits come
from vtab, so this needs its extra; what is judged runs in ONNX Runtime alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export import cli, splits
from export.agreement import opened
from export.runtime import Classifier, read_json, read_manifest, sha256

if TYPE_CHECKING:
    from export.splits import Split


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Classify the split, print and return the figures.

    Raises:
        ValueError: data that does not open or has other classes; a run that the package was not made of.
    """
    args = _parser().parse_args(argv)
    cli.at_least(1, args, "test_limit", "threads")
    preprocess = args.variant == "preprocess"
    chosen = {"variant": "float32" if preprocess else args.variant, "threads": args.threads}
    task = args.task if args.task in read_manifest(args.package)["tasks"] else None  # else the name of its data
    runtime = Classifier(args.package, task, **chosen)
    runtime.pixels()  # or it is refused
    judged = _recorded(args.run, runtime) if args.run else {}
    run = splits.settings(args.run / "adapter.safetensors") if args.run else {}
    try:
        data = splits.open_data(run, args.task or runtime.task, args.data_root, runtime.labels)
    except (ValueError, OSError) as error:
        if run.get("data_root") and not args.data_root:
            raise ValueError(f"{error}; if the images lie elsewhere now, name --data-root") from error
        raise
    split = data.splits[judged.get("split", "test")].head(args.test_limit or _examples(judged))
    predicted = np.concatenate([*(_whole if preprocess else _squashed)(args.package, runtime, split)])
    score = splits.score(int((predicted == split.labels).sum()), len(split))
    result = {
        "task": runtime.task,
        "variant": args.variant,
        "data": data.source,
        "split": judged.get("split", "test"),
        "images": score.total,
        "accuracy": score.percent,
        "interval95": score.interval,
        "pytorch": _pytorch(args.run, judged, predicted) if judged else None,
    }
    print(f"{result['task']} ({result['data']}), {result['split']}: {args.variant} in ONNX Runtime {score}")
    if result["pytorch"]:
        print("PyTorch {accuracy:.1f} % of {images:,}, {said}".format(**result["pytorch"]))
    if args.json:
        cli.write_json(args.json, result)
    return result


def _recorded(run: Path, runtime: Classifier) -> dict[str, Any]:
    """result.json of the run that the package's task was made of, or nothing where it has none."""
    adapter = run / "adapter.safetensors"
    made_of = {task["source_sha256"]: name for name, task in runtime.manifest["tasks"].items()}
    if not adapter.is_file() or sha256(adapter) not in made_of:
        raise ValueError(f"{runtime.folder} was not made of {run}; name the run it was exported from")
    runtime.switch(made_of[sha256(adapter)])
    return read_json(run / "result.json") if (run / "result.json").is_file() else {}


def _examples(judged: dict[str, Any]) -> int | None:
    """How many images the run was judged on; older records call them so."""
    return judged.get("examples", judged.get("images"))


def _squashed(package: Path, runtime: Classifier, split: "Split") -> Iterator[np.ndarray]:
    for pixels, _ in split.batches(runtime.preprocessor["size"]["height"], splits.BATCH):
        yield runtime.logits(pixels).argmax(1)


def _whole(package: Path, runtime: Classifier, split: "Split") -> Iterator[np.ndarray]:
    """The preprocess graph takes images as they are, one by one."""
    session = opened(package, runtime.manifest)
    for i in range(len(split)):
        image = np.asarray(splits.upright(split, i))
        yield session.run(["probabilities"], {"image": image}, runtime.run_options())[0].argmax(1)


def _pytorch(run: Path, judged: dict[str, Any], predicted: np.ndarray) -> dict[str, Any]:
    """What the run recorded of PyTorch, and on how many images the package decides the same."""
    found = {key: judged[key] for key in ("accuracy", "interval95")} | {"images": _examples(judged)}
    same, said = None, "which predictions.npz does not tell image by image"
    file = run / "predictions.npz"
    if file.is_file():
        with np.load(file, allow_pickle=False) as stored:
            recorded = stored["predicted"][: len(predicted)]
        if len(recorded) == len(predicted):
            same = int((recorded == predicted).sum())
            said = f"the same class on {same:,} of {len(predicted):,}"
    return found | {"same_class": same, "said": said}


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m export.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, metavar="DIR", help="what python -m export wrote")
    parser.add_argument("--run", type=Path, metavar="RUN_DIR", help="its run: brings the data and PyTorch's figures")
    parser.add_argument("--data-root", type=Path, metavar="PATH", help="the task's images, as for vtab.train")
    parser.add_argument("--task", metavar="NAME", help="which task (default: the package's first)")
    parser.add_argument("--variant", default="float32", metavar="NAME", help="which graph (default: float32)")
    parser.add_argument("--test-limit", type=int, metavar="N", help="the first N images (default: the run's)")
    parser.add_argument("--threads", type=int, metavar="N", help="of ONNX Runtime (default: its choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    cli.run(main)
