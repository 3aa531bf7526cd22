"""What one package lacks to be another, in a file: python -m export.delta apply FILE --base DIR --out DIR

`python -m export --delta RUN --base DIR --out FILE` makes it. Applied, by numpy and onnx alone, it gives what
`python -m export RUN` writes, byte for byte, or nothing.

    tensor = bits⁻¹( bits(base + float32(Σ_k up[:, k] ⊗ down[k])) + residual )

Stored are, of each tensor of the run's graph:
    nothing               where the base has the same one
    up, down, residual    where the difference is a product of thin matrices (LoRA); the residual is what rounding left,
                          in units of the last place: nearly all 0
    residual              where it is not (circulant …): a dense delta
    values                where the base has no tensor of that name and shape (the head)
and the graph without its tensors, and the package's other files. The factors are those of the difference itself, hence
whatever an exporter does to a weight (it transposes, it folds batch norms in) is in them already. The sum over k runs
in float64 and element by element, which every machine rounds alike.
"""

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from export import cli
from export.runtime import TOLERANCE, check_files, read_manifest
from export.shape import SHA256, apart, fits
from export.store import load, save, whole_folder

FORMAT = 1
TEXTS = ("config.json", "preprocessor_config.json", "manifest.json")
KEY, GRAPH = "capavision_export_delta", "graph"
THIN = 1 / 3  # of full rank; beyond it, factors save little
ROOM = 2**20  # bytes that a package may take beyond what its base suggests


def make(source: Any, base: Path, out: Path, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Write the delta of a run, an `export.source.Source`, to the package `base`; returns the run's own manifest.

    Raises:
        ValueError: `out` exists; `base` is a split package, or of another model; what `export.package.build` refuses.
        OSError: the disk is full.
    """
    from capavision.files import refuse_existing, replacing
    from export.package import build

    refuse_existing(out)
    theirs = _base_manifest(base)
    if theirs["base"] != source.about["base"]:
        has, wants = apart(theirs["base"], source.about["base"])
        raise ValueError(f"{base} has {has}, the run has {wants}; name a package of the same base")
    settings = {"exporter": theirs["exporter"], "dynamic_size": "dynamic_size" in theirs}
    with replacing(out) as file, tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "merged"
        manifest = build(source, merged, opset=theirs["opset"], tolerance=tolerance, **settings)
        tensors, same = _difference(base / "model.onnx", merged / "model.onnx")
        texts = {name: (merged / name).read_text() for name in TEXTS}
        about = {"format": FORMAT, "base": theirs["files"]["model.onnx"]["sha256"], "same": same, "texts": texts}
        save_file(tensors, file, {KEY: json.dumps(about)})
        apply(file, base, Path(folder) / "applied")  # which compares every byte
        _tell(out, file.stat().st_size, manifest, tensors)
    return manifest


def _tell(out: Path, size: int, manifest: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    ways = [name.rpartition("/")[2] for name in tensors]
    factored, whole = ways.count("up"), ways.count("values")
    kinds = f"{factored} tensors as factors, {ways.count('residual') - factored} dense, {whole} whole"
    graph = sum(each["bytes"] for name, each in manifest["files"].items() if name.startswith("model.onnx"))
    print(f"{out}: {size / 1e6:.2f} MB beside a graph of {graph / 1e6:.1f} MB; {kinds}")


def _base_manifest(base: Path) -> Any:
    manifest = read_manifest(base)
    check_files(base, manifest)
    if manifest["form"] == "split":
        raise ValueError(
            f"{base} is a split package, whose graph has open slots; name a merged package of the same base"
        )
    return manifest


def _difference(base: Path, merged: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What to store, and which tensors equal one of the base's, by whose name."""
    graph = load(merged)
    own = {t.name: t for t in load(base).graph.initializer if t.HasField("raw_data")}
    by_bytes = {t.raw_data: name for name, t in own.items()}
    stored: dict[str, np.ndarray] = {}
    same: dict[str, str] = {}
    for tensor in [t for t in graph.graph.initializer if t.HasField("raw_data")]:
        name, like = tensor.name, own.get(tensor.name)
        if tensor.raw_data in by_bytes:
            same[name] = name if like and like.raw_data == tensor.raw_data else by_bytes[tensor.raw_data]
        elif like and (like.dims, like.data_type) == (tensor.dims, onnx.TensorProto.FLOAT):
            parts = difference(*(onnx.numpy_helper.to_array(each) for each in (like, tensor)))
            stored |= {f"{name}/{part}": array for part, array in parts.items()}
        else:
            stored[f"{name}/values"] = np.frombuffer(tensor.raw_data, np.uint8)
        tensor.raw_data = b""
    stored[GRAPH] = _deflated(graph.SerializeToString())
    return stored, same


def difference(base: np.ndarray, merged: np.ndarray) -> dict[str, np.ndarray]:
    """up, down and residual that `added` makes `merged` of, float32 as `base`; a residual alone where no rank is low.

    >>> rng = np.random.default_rng(0)
    >>> up, down, W = (rng.normal(size=shape).astype(np.float32) for shape in ((48, 2), (2, 32), (48, 32)))
    >>> parts = difference(W, W + up @ down)
    >>> sorted(parts), parts["up"].shape
    (['down', 'residual', 'up'], (48, 2))
    >>> np.array_equal(added(W, parts), W + up @ down)
    True
    """
    parts = _factors(base, merged)
    bits = merged.view(np.int32) - added(base, parts).view(np.int32)  # wraps
    return parts | {"residual": _deflated(_planes(bits))}


def added(base: np.ndarray, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The tensor that `parts` make of `base`, the same on every machine."""
    found = base.astype(np.float32)  # a copy
    if "up" in parts:
        rows = found.reshape(len(found), -1)
        up, down = (parts[name].astype(np.float64) for name in ("up", "down"))
        step = max(1, (1 << 16) // down.shape[1])  # rows whose sums stay in the cache
        for start in range(0, len(rows), step):
            block = np.zeros((len(rows[start : start + step]), down.shape[1]))
            for k in range(len(down)):
                block += up[start : start + step, k : k + 1] * down[k]
            rows[start : start + step] += block.astype(np.float32)
    if "residual" in parts:
        bits = found.view(np.int32)
        bits += _unplaned(parts["residual"], bits.nbytes).reshape(bits.shape)
    return found


def _factors(base: np.ndarray, merged: np.ndarray) -> dict[str, np.ndarray]:
    """up (n, r) and down (r, m) with merged - base = up @ down but for rounding, by a randomised range finder.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.1 and section 5.1.
    """
    if base.ndim < 2:
        return {}
    n = len(base)
    wanted = (merged.astype(np.float64) - base).reshape(n, -1)
    m, ulp = wanted.shape[1], float(np.finfo(np.float32).eps * max(abs(base).max(), abs(merged).max()))
    width, most = 8, int(THIN * min(n, m))
    while width <= 2 * most:
        probe = np.random.default_rng(0).standard_normal((m, width))
        Q, _ = np.linalg.qr(wanted @ probe)
        small = Q.T @ wanted
        if np.abs(wanted - Q @ small).max() <= 4 * ulp:
            U, s, V = np.linalg.svd(small, full_matrices=False)
            rank = int((s > ulp * (n**0.5 + m**0.5)).sum())
            root = np.sqrt(s[:rank])
            up, down = (Q @ U[:, :rank]) * root, root[:, None] * V[:rank]
            return {"up": up.astype(np.float32), "down": down.astype(np.float32)} if 0 < rank <= most else {}
        width *= 2
    return {}


def _planes(bits: np.ndarray) -> bytes:
    """Small numbers of either sign as small ones without, then all first bytes, all second ones …: deflates well."""
    zigzag = ((bits << 1) ^ (bits >> 31)).astype("<i4").ravel()
    return zigzag.view(np.uint8).reshape(-1, 4).T.tobytes()


def _unplaned(stored: np.ndarray, size: int) -> np.ndarray:
    planes = np.frombuffer(_inflated(stored, size), np.uint8).reshape(4, -1)
    zigzag = np.ascontiguousarray(planes.T).view("<u4").ravel()
    bits: np.ndarray = ((zigzag >> 1) ^ (0 - (zigzag & 1))).astype(np.uint32).view(np.int32)
    return bits


def _deflated(content: bytes) -> np.ndarray:
    return np.frombuffer(zlib.compress(content, 6), np.uint8)


def _inflated(stored: np.ndarray, most: int) -> bytes:
    """At most so many bytes: a small file may ask for any amount of memory."""
    stream = zlib.decompressobj()
    content = stream.decompress(stored.tobytes(), most + 1)
    if len(content) > most or not stream.eof:
        raise ValueError(f"a part is cut off, or longer than {most:,} bytes")
    return content


def apply(file: Path, base: Path, out: Path) -> dict[str, Any]:
    """Write the run's package to `out`, whole or not at all; returns its manifest.

    Raises:
        ValueError: `out` exists, a damaged or foreign file, one of a newer format, or one for another base.
        OSError: the disk is full.

    >>> manifest = apply(Path("pets.delta"), Path("package"), Path("pets"))  # doctest: +SKIP
    """
    about, stored = _read(file)
    theirs = _base_manifest(base)
    if theirs["files"]["model.onnx"]["sha256"] != about["base"]:
        raise ValueError(f"{file} was made for another base package than {base}; name that one")
    try:
        graph = _assembled(about["same"], stored, load(base / "model.onnx").graph)
    except (LookupError, TypeError, ValueError, ArithmeticError, zlib.error, DecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}); make it again") from error
    with whole_folder(out) as work:
        for name in TEXTS:
            (work / name).write_text(about["texts"][name])
        try:
            save(graph, work / "model.onnx")
            manifest = read_manifest(work)
            check_files(work, manifest)
            if manifest["files"].keys() != {path.name for path in work.iterdir()} - {"manifest.json"}:
                raise ValueError("its manifest lists other files")
        except (ValueError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ValueError(
                f"{file} makes another package than python -m export wrote ({cli.first_line(error)}); make it again"
            ) from error
    return manifest


def _assembled(same: dict[str, str], stored: dict[str, np.ndarray], base: onnx.GraphProto) -> onnx.ModelProto:
    nodes, own = sum(node.ByteSize() for node in base.node), {tensor.name: tensor for tensor in base.initializer}
    graph: onnx.ModelProto = onnx.ModelProto.FromString(_inflated(stored[GRAPH], 4 * nodes + ROOM))
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, array in stored.items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = array
    room = ROOM + 2 * sum(t.ByteSize() for t in own.values()) + sum(array.nbytes for array in stored.values())
    for tensor in [t for t in graph.graph.initializer if t.name in parts or t.name in same]:
        if tensor.external_data:
            raise ValueError(f"{tensor.name} lies in another file")
        tensor.raw_data = _bytes(tensor.name, own, same, parts.get(tensor.name, {}))
        room -= len(tensor.raw_data)
        if room < 0:
            raise ValueError("it makes more than twice its base")
    return graph


def _bytes(name: str, own: dict[str, Any], same: dict[str, str], parts: dict[str, np.ndarray]) -> bytes:
    if name in same:
        content: bytes = own[same[name]].raw_data
        return content
    if "values" in parts:
        return parts["values"].tobytes()
    return added(onnx.numpy_helper.to_array(own[name]), parts).tobytes()


def _read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    try:
        with safe_open(file, framework="numpy") as opened:
            about = json.loads((opened.metadata() or {}).get(KEY, "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}); make it again") from error
    if not fits(about, {"format": int}) or GRAPH not in tensors:
        raise ValueError(f"{file} is a safetensors file, but not one that python -m export --delta wrote")
    if about["format"] > FORMAT:
        raise ValueError(f"{file} has format {about['format']}, this one reads up to {FORMAT}; upgrade capavision")
    if not fits(about, {"base": SHA256, "same": {str: str}, "texts": dict.fromkeys(TEXTS, str)}):
        raise ValueError(f"{file} is damaged: it lacks what python -m export --delta writes; make it again")
    return about, tensors


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Apply, and say so; returns the manifest of the new package."""
    parser = cli.Parser(prog="python -m export.delta", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=cli.Parser)
    verb = verbs.add_parser("apply", help="make the run's package of the base's")
    verb.add_argument("file", type=Path, metavar="FILE", help="what python -m export --delta wrote")
    verb.add_argument("--base", type=Path, required=True, metavar="DIR", help="the package that it was made for")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new package's folder, not there yet")
    args = parser.parse_args(argv)
    manifest = apply(args.file, args.base, args.out)
    print(f"{args.out}: {', '.join(manifest['tasks'])}, the same bytes as python -m export writes")
    return manifest


if __name__ == "__main__":
    cli.run(main)
