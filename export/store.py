"""Graphs and packages on disk, without PyTorch."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx

from export.cli import first_line

LARGE = 1536 << 20  # bytes of weights; protobuf ends at 2 GB, and a graph grows when its variants are made
INLINE = 1024  # bytes; a smaller tensor stays in the graph, where shapes must be known


def save(proto: onnx.ModelProto, path: Path, large: int = LARGE) -> None:
    """Write the graph and let ONNX check it; weights of more than `large` bytes go to a file beside it, path + ".data".

    `proto` gives its weights away then.

    Raises:
        OSError: the disk is full.
    """
    tensors = [tensor for tensor in proto.graph.initializer if tensor.HasField("raw_data")]
    sizes = [tensor.ByteSize() for tensor in tensors]
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx would write behind what is there
    if sum(sizes) > large:
        for tensor, size in zip(tensors, sizes, strict=True):
            if size > INLINE:
                onnx.external_data_helper.set_external_data(tensor, data.name)
    onnx.save(proto, path)
    onnx.checker.check_model(str(path), full_check=True)


def load(path: Path) -> onnx.ModelProto:
    """A graph with its weights.

    Raises:
        ValueError: it is damaged, or its weights lie outside its folder.
        OSError: it is not there.
    """
    try:
        return onnx.load(path)
    except OSError:
        raise
    except Exception as error:  # protobuf and onnx raise classes of their own
        raise ValueError(f"{path} does not load ({first_line(error)}); export again") from error


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; it becomes `path` when the block ends well, and vanishes when not.

    Raises:
        ValueError: `path` exists.
        OSError: the disk is full or the parent cannot be written.
    """
    if path.exists():
        raise ValueError(f"{path} exists; name another folder, or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as hidden:
        folder = Path(hidden) / path.name  # mkdtemp makes folders that only their owner can enter
        folder.mkdir()
        yield folder
        if path.exists():
            raise ValueError(f"{path} was made by another process meanwhile; name another folder, or delete it first")
        folder.rename(path)
