"""Packages as a Triton model repository: python -m export.triton DIR --out REPO

REPO/<task>/config.pbtxt      inputs, outputs, dynamic batching (model_config.proto of triton-inference-server/common)
REPO/<task>/labels.txt        a label a line, for Triton's classification extension
REPO/<task>/1/model.onnx      for the onnxruntime backend; model.onnx.data beside it, where it is large

Triton has no adapters, so each task of a split package becomes a model of its own, whose slots hold the task's values:
N tasks take N times the base's memory there. Normalisation stays with the client; config.pbtxt carries mean and std.
Dynamic int8 takes its scales from a whole batch: its models run one image at a time, so that no answer depends on its
neighbours.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from export import cli, store
from export.runtime import Classifier, random_pixels, relative_error

TOLERANCE = 1e-5


def main(argv: list[str] | None = None) -> list[str]:
    """Write the repository, whole or not at all; returns the models' names."""
    parser = cli.Parser(prog="python -m export.triton", description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path, nargs="+", metavar="DIR", help="what python -m export wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="REPO", help="the repository, not there yet")
    parser.add_argument("--variant", default="float32", help="of the packages' graphs (default: float32)")
    parser.add_argument("--batch", type=int, metavar="N", help="most images a run (default: 16; int8: 1)")
    parser.add_argument("--delay", type=int, default=5000, metavar="US", help="µs that an image waits (default: 5000)")
    parser.add_argument("--queue", type=int, default=512, metavar="N", help="most that wait (default: 512)")
    args = parser.parse_args(argv)
    cli.at_least(1, args, "batch", "queue")
    cli.at_least(0, args, "delay")
    if args.variant == "int8" and (args.batch or 1) > 1:
        raise ValueError(
            f"--variant int8 takes its scales from a whole batch, and --batch is {args.batch}; leave that out"
        )
    args.batch = args.batch or (1 if args.variant == "int8" else 16)
    limits = {"batch": args.batch, "delay": args.delay, "queue": args.queue}
    with store.whole_folder(args.out) as work:
        for package in args.packages:
            classifier = Classifier(package, variant=args.variant)
            classifier.pixels()  # or it is refused
            for task in classifier.tasks:
                _add(work, classifier, task, limits)
        models = sorted(path.name for path in work.iterdir())
    print(f"{args.out}: {', '.join(models)}; tritonserver --model-repository={args.out}")
    return models


def _add(repository: Path, classifier: Classifier, task: str, limits: Mapping[str, int]) -> None:
    """One model.

    Raises:
        ValueError: a task that cannot name a folder, that another package has, or whose model computes something else.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", task, re.ASCII):
        raise ValueError(f"task {task!r} cannot name a Triton model, which is a folder; export it under another name")
    if (repository / task).exists():
        raise ValueError(f"{classifier.folder} and a package before it both have a task {task!r}; give each its --out")
    about = classifier.manifest["tasks"][task]
    proto = store.load(classifier.folder / classifier.manifest["graphs"][classifier.variant])
    if about["adapter"]:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(classifier.folder / about["adapter"]))
        fill(proto, {name: value.numpy() for name, value in adapter.get_parameters().items()}, len(about["labels"]))
    version = repository / task / "1"
    version.mkdir(parents=True)
    store.save(proto, version / "model.onnx")
    _compare(version / "model.onnx", classifier, task)
    labels = "".join(f"{' '.join(label.split())}\n" for label in about["labels"])
    (repository / task / "labels.txt").write_text(labels, "utf-8")
    (repository / task / "config.pbtxt").write_text(config(task, classifier, limits))


def fill(proto: onnx.ModelProto, values: Mapping[str, np.ndarray], classes: int) -> None:
    """Put a task's values into the slots of a base graph, for good: they are inputs no more."""
    for initializer in proto.graph.initializer:
        if initializer.name in values:
            initializer.CopyFrom(onnx.numpy_helper.from_array(values[initializer.name], initializer.name))
    kept = [each for each in proto.graph.input if each.name not in values]
    del proto.graph.input[:], proto.graph.value_info[:]
    proto.graph.input.extend(kept)
    output = next(each for each in proto.graph.output if each.name == "logits")
    output.type.tensor_type.shape.dim[1].dim_value = classes


def _compare(model: Path, classifier: Classifier, task: str) -> None:
    pixels = random_pixels(0, 2, classifier.preprocessor["size"]["height"])
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixel_values": classifier.normalize(pixels)})
    error = relative_error(found, classifier.logits(pixels, task))
    if not error <= TOLERANCE:
        raise ValueError(f"{task}: the model and the package differ by {error:.1e} of the largest logit; export again")


def config(task: str, classifier: Classifier, limits: Mapping[str, int]) -> str:
    """The text of config.pbtxt."""
    size = classifier.preprocessor["size"]
    classes = len(classifier.manifest["tasks"][task]["labels"])
    about = {key: classifier.preprocessor[key] for key in ("image_mean", "image_std", "rescale_factor", "resample")}
    parameters = "".join(
        f"parameters {{ key: {_text(key)} value {{ string_value: {_text(json.dumps(value))} }} }}\n"
        for key, value in about.items()
    )
    return f"""name: {_text(task)}
backend: "onnxruntime"
max_batch_size: {limits["batch"]}
input [ {{ name: "pixel_values" data_type: TYPE_FP32 dims: [ 3, {size["height"]}, {size["width"]} ] }} ]
output [ {{ name: "logits" data_type: TYPE_FP32 dims: [ {classes} ] label_filename: "labels.txt" }} ]
dynamic_batching {{
  max_queue_delay_microseconds: {limits["delay"]}
  default_queue_policy {{ timeout_action: REJECT max_queue_size: {limits["queue"]} }}
}}
{parameters}"""


def _text(value: Any) -> str:
    """A string literal of protobuf's text format, whose escapes JSON's ASCII form shares."""
    return json.dumps(value)


if __name__ == "__main__":
    cli.run(main)
