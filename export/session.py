"""Sessions of ONNX Runtime, one for each graph and setting, and the adapters of the tasks that share one.

An adapter is handed to a run, never to the session, so that calls for different tasks may overlap.
"""

import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from export.cli import first_line

PROVIDERS = {  # by preference; ONNX Runtime offers what it was built with
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
_sessions: weakref.WeakValueDictionary[object, onnxruntime.InferenceSession] = weakref.WeakValueDictionary()
_opening = threading.Lock()


def providers(asked: Sequence[str] | None = None) -> list[str]:
    """The execution providers to open a session with: the best that there is, or those asked for; then the CPU.

    Raises:
        ValueError: one that this ONNX Runtime does not offer.
    """
    offered = {name: full for name, full in PROVIDERS.items() if full in onnxruntime.get_available_providers()}
    if asked is None:
        return list(dict.fromkeys([next(iter(offered.values())), PROVIDERS["cpu"]]))
    for name in asked:
        if name not in offered:
            raise ValueError(f"provider {name!r} is not offered by this ONNX Runtime; choose of {', '.join(offered)}")
    return list(dict.fromkeys([*(offered[name] for name in asked), PROVIDERS["cpu"]]))


def session(
    graph: Path,
    identity: Sequence[str],
    first: Mapping[str, np.ndarray],
    threads: int | None,
    asked: Sequence[str] | None,
) -> onnxruntime.InferenceSession:
    """The graph's session, warm; whoever asks for the same bytes with the same settings gets the same one.

    Args:
        graph: the .onnx file.
        identity: sha256 of its bytes, and of those of its external data.
        first: inputs that warm it up.
        threads: of ONNX Runtime; None leaves it the choice.
        asked: keys of `PROVIDERS`; None takes the best that there is.

    Raises:
        ValueError: a graph that does not load, a provider that is not there or does not start.
    """
    wanted = providers(asked)
    key = (*identity, threads, *wanted)
    with _opening:
        found = _sessions.get(key)
        if found is None:
            found = _sessions[key] = _open(graph, first, threads, wanted)
    silent = [name for name in wanted if asked is not None and name not in found.get_providers()]
    if silent:
        raise ValueError(f"{silent[0]} does not start on this machine; name another provider, or install its libraries")
    return found


def plain(graph: Path | bytes) -> onnxruntime.InferenceSession:
    """A session on the CPU, to compare with; what it complains of it raises, and does not print too."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    model = graph if isinstance(graph, bytes) else str(graph)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _open(
    graph: Path, first: Mapping[str, np.ndarray], threads: int | None, wanted: list[str]
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every slot
    options.add_session_config_entry("session.x64quantprecision", "1")  # int8 sums overflow on x86 without VNNI
    if threads:
        options.intra_op_num_threads = threads
    try:
        opened = onnxruntime.InferenceSession(str(graph), options, providers=wanted)
        opened.run(None, dict(first))  # the first run is slow
    except Exception as error:  # onnxruntime raises classes of its own
        raise ValueError(f"{graph} does not load ({first_line(error)}); export again") from error
    return opened


def model_version(base_sha256: str) -> int:
    """What an adapter file says of its base: the file has room for 31 bits of the checksum, the manifest has it all."""
    return int(base_sha256[:8], 16) >> 1


def adapter(path: Path, slots: Collection[str], base_sha256: str) -> onnxruntime.LoraAdapter:
    """A task's values, mapped into memory.

    Raises:
        ValueError: a damaged file, one made for another base, or one that does not fill each slot once.
    """
    try:
        read = onnxruntime.AdapterFormat.read_adapter(str(path))
        names, version = set(read.get_parameters()), read.get_model_version()
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(path))
    except Exception as error:  # onnxruntime raises classes of its own
        raise ValueError(f"{path} does not load ({first_line(error)}); export again") from error
    if version != model_version(base_sha256):
        raise ValueError(f"{path} was made for another base graph; take the adapter of this package, or export again")
    if wrong := sorted(names ^ set(slots)):
        what = "fills" if wrong[0] in names else "leaves out"
        raise ValueError(f"{path} {what} {wrong[0]}, unlike what its manifest says; export again")
    return loaded
