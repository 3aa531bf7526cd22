"""What the JSON of a package looks like. It may come from anyone, so it is compared before anything reads on."""

import re
from typing import Any

FILE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # in the package: no "..", no drive, no absolute path
SHA256 = re.compile("[0-9a-f]{64}")


def fits(value: Any, shape: Any) -> bool:
    """Whether a value read from JSON has a shape: a type, a pattern or a test; [shape] of each, {str: shape} of each
    value, {"key": shape} of these keys, whatever others there are.

    >>> fits({"names": ["ant"], "seed": 1}, {"names": [str]}), fits({"names": [1]}, {"names": [str]}), fits(True, int)
    (True, False, False)
    """
    if isinstance(shape, type):
        return type(value) is shape  # True is no int
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and shape.fullmatch(value) is not None
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(each, shape[0]) for each in value)
    if isinstance(shape, dict):
        keys = value if isinstance(value, dict) and str in shape else shape
        return isinstance(value, dict) and all(
            k in value and fits(value[k], shape.get(k, shape.get(str))) for k in keys
        )
    return bool(shape(value))


def apart(first: Any, second: Any) -> tuple[str, str]:
    """What each of two values says that the other does not.

    >>> apart({"model": "resnet18", "weights": "random"}, {"model": "resnet18", "weights": "pretrained"})
    ('weights random', 'weights pretrained')
    """
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return str(first), str(second)
    keys = [key for key in first | second if first.get(key) != second.get(key)]
    one, other = (", ".join(f"{key} {each.get(key)}" for key in keys) for each in (first, second))
    return one, other


def number(value: Any) -> bool:
    """A finite one."""
    return type(value) in (int, float) and abs(value) < 1e300


def _seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**64


def _few(value: Any) -> bool:
    return type(value) is int and 0 < value <= 64


def _table(value: Any) -> bool:
    return fits(value, [[number]]) and len({len(row) for row in value}) <= 1


def _logits(value: Any) -> bool:
    """A row for each item, or of questions a table."""
    return _table(value) or (fits(value, [_table]) and len({(len(rows), *map(len, rows[:1])) for rows in value}) <= 1)


def _token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def length(value: Any) -> bool:
    """Of a text that is cut there, in tokens."""
    return type(value) is int and 3 <= value <= 2**20  # a token and the two around it, at the least


def _share(value: Any) -> bool:
    """Of a window's tokens that the next one has too."""
    return type(value) is int and 0 <= value < 2**20


def _count(value: Any) -> bool:
    """Of what there is one at the least."""
    return type(value) is int and 0 < value < 2**31


def _threshold(value: Any) -> bool:
    """A number, or None where there is none."""
    return value is None or number(value)


def _null(value: Any) -> bool:
    return value is None or _token(value)


def _input(value: Any) -> bool:
    return value in ("input_ids", "attention_mask", "token_type_ids")


def _form(value: Any) -> bool:
    return value in ("merged", "folded", "split")


def _adapter(value: Any) -> bool:
    return value is None or fits(value, FILE)


MANIFEST = {
    "form": _form,
    "files": {str: {"sha256": SHA256, "bytes": int}},
    "graphs": {str: FILE},
    "tasks": {
        str: {
            "labels": [str],
            "adapter": _adapter,
            "source_sha256": SHA256,
            "parity": {"tolerance": number},
            "probe": {"seed": _seed, "count": _few, "logits": _logits},
        }
    },
    "opset": int,
    "exporter": str,
}
TOKENS = {"max_length": length, "pair": bool, "names": [_input], "vocabulary": _token, "pad": _token}
ANSWERS = {"stride": _share, "longest_answer": _count, "n_best": _count, "null_threshold": _threshold}
INPUTS = [  # of packages whose input is not an image
    {"kind": re.compile("text"), **TOKENS},
    {"kind": re.compile("question"), **TOKENS, **ANSWERS, "null": _null},
]
SPLIT = {"base_sha256": SHA256, "slots": [str], "tasks": {str: {"adapter": FILE}}}


def whole(manifest: Any) -> bool:
    """Whether a manifest has all that a runtime reads, and names no file that it does not list."""
    if not fits(manifest, MANIFEST) or (manifest["form"] == "split" and not fits(manifest, SPLIT)):
        return False
    if "input" in manifest and not any(fits(manifest["input"], each) for each in INPUTS):
        return False
    if "input" in manifest and "tokenizer.json" not in manifest["files"]:
        return False
    files, graphs, tasks = (manifest[key] for key in ("files", "graphs", "tasks"))
    named = {*graphs.values(), *(task["adapter"] for task in tasks.values())} - {None}
    if not tasks or "base" not in manifest or graphs.get("float32") != "model.onnx":
        return False
    return named <= files.keys() and fits([*files], [FILE])
