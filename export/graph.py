"""A folded model as an ONNX graph with a dynamic batch, without a trace of the machine that made it."""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import capavision as cv
from export import names
from export.cli import first_line
from export.runtime import relative_error
from export.session import plain
from export.store import LARGE

OPSETS = (18, 20, 23)  # the widest reach, PyTorch's own choice, the newest that PyTorch writes
OPSET = 20
LEGACY_OPSET = 20  # the newest that the legacy exporter writes
EXPORTERS = ("dynamo", "legacy")
UNOPTIMIZED = "dynamo, unoptimized"
WRONG = 1e-3  # relative error that no rounding makes
Inputs = Mapping[str, tuple[Tensor, dict[int, Any]]]  # by name: an example, and its free axes, a Dim or a name each
Outputs = Mapping[str, Mapping[int, str]]  # by name: its free axes
LOGITS: Outputs = {"logits": {0: "batch"}}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to trace with: what the model is given, the opset, the slots beside, which have defaults, what it gives."""

    given: Inputs
    opset: int
    slots: Inputs
    outputs: Outputs

    @property
    def examples(self) -> tuple[Tensor, ...]:
        """Of all inputs."""
        return tuple(example for example, _ in [*self.given.values(), *self.slots.values()])


def outputs(model: nn.Module, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """A model's logits, of a model for questions those of start and end: timm's take an image by position, those of
    transformers their inputs by name, and give more."""
    found = model(*given.values()) if "pixel_values" in given else model(**given)
    if isinstance(found, Tensor):
        return (found,)
    return tuple(found[name] for name in ("logits", "start_logits", "end_logits") if name in found)


def folded(model: nn.Module) -> nn.Module:
    """A folded copy in float32 on the CPU, in eval; the model itself is left alone."""
    copied = cv.fold(copy.deepcopy(model).cpu().float())
    return copied.eval()


def to_onnx(
    model: nn.Module,
    size: int,
    labels: dict[str, str],
    opset: int | None = None,
    *,
    exporter: str | None = None,
    dynamic_size: bool = False,
    inputs: Inputs | None = None,
) -> onnx.ModelProto:
    """Trace `model` at (batch, 3, size, size); `exporter_of` and `fallback_of` tell how.

    A graph that ONNX refuses, or that computes something else in ONNX Runtime, is its exporter's failure. Dynamo then
    tries again without PyTorch's optimizer, whose mistakes these mostly are; last comes legacy.

    Args:
        model: folded, in eval, float32, on the CPU.
        size: height and width, fixed in the graph unless `dynamic_size`.
        labels: class index as text -> name, stored in the graph.
        opset: one of OPSETS; None is 20.
        exporter: "dynamo" or "legacy"; None is dynamo and, where that fails, legacy, with a warning. With
            `dynamic_size` it is dynamo alone, because legacy takes sizes that a model computes with for constants and
            does not say so: whoever asks for it compares at another size, as `export.sizes` does.
        dynamic_size: leave height and width open too.
        inputs: what `model` takes after the image, with defaults.

    Raises:
        ValueError: another opset or exporter, or a model that the exporter cannot trace.
    """
    for module in model.modules():  # timm's global switch would come too late for a live model
        if getattr(module, "fused_attn", False) and not isinstance(getattr(module, "delta", None), cv.AttentionDelta):
            module.fused_attn = False  # type: ignore[assignment]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))  # a batch of 1 would be baked in
    if dynamic_size:
        axes: dict[int, Any] = {0: "batch", 2: "height", 3: "width"}  # by name: their ranges are the model's affair
    else:
        axes = {0: torch.export.Dim("batch", min=1)}
    only = "dynamo" if dynamic_size and exporter is None else exporter
    return traced(model, {"pixel_values": (pixels, axes)}, labels, opset, exporter=only, slots=inputs)


def traced(
    model: nn.Module,
    given: Inputs,
    labels: dict[str, str],
    opset: int | None = None,
    *,
    exporter: str | None = None,
    slots: Inputs | None = None,
    outputs: Outputs = LOGITS,
) -> onnx.ModelProto:
    """Trace `model` with any inputs; `given` is by position, `outputs` by name, and all else as `to_onnx` has it.

    Raises:
        ValueError: another opset or exporter, or a model that the exporter cannot trace.
    """
    opset = OPSET if opset is None else opset
    check_choices(opset, exporter)
    if exporter != "legacy":
        import onnxscript  # noqa: F401  # without it dynamo fails, and that is no reason for legacy to take over
    request = Request(given, opset, slots or {}, outputs)
    only = exporter or ("dynamo" if opset > LEGACY_OPSET else "")
    proto, kind, failures = _first_that_works([name for name in ATTEMPTS if name.startswith(only)], model, request)
    about = {"format_version": "1", "exporter": kind.partition(",")[0], "id2label": json.dumps(labels)}
    if failures:
        about["fallback"] = f"{_told(failures)}; taken: {kind}"
        print(f"warning: {type(model).__name__}: {about['fallback']}", file=sys.stderr)
    onnx.helper.set_model_props(proto, about)
    return proto


def check_choices(opset: int | None, exporter: str | None) -> None:
    """Raise ValueError unless there is such an opset, and such an exporter that writes it."""
    if opset is not None and opset not in OPSETS:
        raise ValueError(f"opset {opset} is none of {', '.join(map(str, OPSETS))}")
    if exporter is not None and exporter not in EXPORTERS:
        raise ValueError(f"exporter {exporter!r} is none of {', '.join(EXPORTERS)}")
    if exporter == "legacy" and (opset or OPSET) > LEGACY_OPSET:
        raise ValueError(f"the legacy exporter writes no opset above {LEGACY_OPSET}, so not {opset}; take dynamo")


def exporter_of(proto: onnx.ModelProto) -> str:
    """The exporter that traced a graph of `to_onnx`: "dynamo" or "legacy"."""
    return _said(proto, "exporter")


def fallback_of(proto: onnx.ModelProto) -> str:
    """Why a graph of `to_onnx` is not by the first way that was tried; "" where it is."""
    return _said(proto, "fallback")


def _said(proto: onnx.ModelProto, key: str) -> str:
    return next((str(prop.value) for prop in proto.metadata_props if prop.key == key), "")


def _first_that_works(
    attempts: list[str], model: nn.Module, request: Request
) -> tuple[onnx.ModelProto, str, dict[str, Exception]]:
    """The graph by the first of these ways that succeeds, which it was, and why those before it failed."""
    failures: dict[str, Exception] = {}
    traced = False
    for kind in attempts:
        if kind == UNOPTIMIZED and not traced:
            continue  # the optimizer was never reached
        model.train().eval()  # drops what some attentions cache, and a failed exporter leaves tracers there
        try:
            with _quiet():
                proto = ATTEMPTS[kind](model, request)
            traced = True
            names.restore(proto, model)
            _clean(proto)
            _refuse_wrong(proto, model, request)
        except Exception as error:  # the exporters raise many classes
            failures[kind] = error
        else:
            return proto, kind, failures
    raise ValueError(f"{type(model).__name__} does not export ({_told(failures)})") from next(iter(failures.values()))


def _told(failures: dict[str, Exception]) -> str:
    return "; ".join(f"{kind}: {one_line(_cause(error))}" for kind, error in failures.items())


def _cause(error: BaseException) -> BaseException:
    """What dynamo wraps into advice on how to report it."""
    return _cause(error.__cause__) if error.__cause__ else error


def one_line(error: BaseException) -> str:
    """The first line of what an error says, within 300 characters and without the folders of this machine."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "…/", first_line(error))[:300]


def _refuse_wrong(proto: onnx.ModelProto, model: nn.Module, request: Request) -> None:
    """Raise unless ONNX accepts the graph and it computes about the same; how nearly is the package's gate to say."""
    if sum(tensor.ByteSize() for tensor in proto.graph.initializer) > LARGE:
        return  # beyond protobuf in memory; `export.store.save` has it checked, and the package compares
    onnx.checker.check_model(proto, full_check=True)
    if request.slots:
        return  # their examples are shapes, whose values may be beyond all rounding; the package compares every task
    session = plain(proto.SerializeToString())
    with torch.no_grad():
        expected = model(*request.examples)
    found = session.run([*request.outputs], {name: example.numpy() for name, (example, _) in request.given.items()})
    pairs = zip(found, (expected,) if isinstance(expected, Tensor) else expected, strict=True)
    if not (error := np.max([relative_error(one, other.numpy()) for one, other in pairs])) <= WRONG:  # or NaN
        raise ValueError(f"ONNX Runtime computes something else, {error:.1e} of the largest logit away")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither exporter's warnings, nor its log, nor the graphs that it prints where it fails."""
    usual = {log: log.level for log in map(logging.getLogger, ("torch.onnx", "torch.fx", "onnxscript"))}
    for log in usual:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as said:
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(said):
                yield
    finally:
        for log, level in usual.items():
            log.setLevel(level)


def _dynamo(model: nn.Module, request: Request, optimize: bool = True) -> onnx.ModelProto:
    symbols = {name: torch.export.Dim(name, min=0) for _, free in request.slots.values() for name in free.values()}
    more = tuple({axis: symbols[name] for axis, name in free.items()} for _, free in request.slots.values())
    dims = tuple(free for _, free in request.given.values())
    program: Any = torch.onnx.export(
        model,
        request.examples,
        dynamo=True,
        optimize=optimize,
        opset_version=request.opset,
        verbose=False,
        input_names=[*request.given, *request.slots],
        output_names=[*request.outputs],
        dynamic_shapes=(*dims, more) if request.slots else dims,
    )
    proto: onnx.ModelProto = program.model_proto
    return proto


def _legacy(model: nn.Module, request: Request) -> onnx.ModelProto:
    if request.slots:
        raise ValueError("it gives inputs no default")
    axes = {name: {axis: _name(dim) for axis, dim in free.items()} for name, (_, free) in request.given.items()}
    with tempfile.TemporaryDirectory() as folder, _muted():  # a file, because in memory it ends at 2 GB
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            request.examples,
            str(path),
            dynamo=False,
            opset_version=request.opset,
            input_names=[*request.given],
            output_names=[*request.outputs],
            dynamic_axes={**axes, **request.outputs},
        )
        return onnx.load(path)


def _name(dim: Any) -> str:
    return dim if isinstance(dim, str) else str(dim.__name__)


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """No standard output, not even that of C++: legacy prints the whole graph where it fails."""
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


ATTEMPTS: dict[str, Callable[[nn.Module, Request], onnx.ModelProto]] = {
    "dynamo": _dynamo,
    UNOPTIMIZED: functools.partial(_dynamo, optimize=False),
    "legacy": _legacy,
}


def _clean(proto: onnx.ModelProto) -> None:
    """Take out stack traces, paths of this machine and stale shapes."""
    proto.doc_string = ""
    for graph in names.graphs(proto.graph):
        del graph.value_info[:]  # stale entries break later quantisation
        for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
            del part.metadata_props[:]
            part.doc_string = ""
