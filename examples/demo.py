"""The whole way in one go: fine-tune a pretrained ViT, test it, export it, run it in ONNX Runtime.

Every step is an ordinary command, printed before it runs, to be repeated by hand. Needs no download beyond the
packages: the images are drawn (dSprites-like, 16 classes: in which column is the shape?), the backbone is in a package.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

TASK = ["--task", "dsprites_loc", "--model", "demo", "--test-limit", "2000"]
BUDGET = ["--epochs", "8", "--batch-size", "32", "--lr", "2e-3", "--drop-path", "0"]
CAPABOOST = ["--method", "lora", "--rank", "8", "--alpha", "16", "--branches", "2", "--masks", "complementary"]


def run(*command: str) -> None:
    """Print one of our commands, then run it."""
    print(f"\n$ python -m {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, "-m", *command], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def table(out: Path, seconds: float) -> str:
    """What came out, side by side, as Markdown."""
    head, adapted = (read(out / name / "result.json") for name in ("head-only", "capaboost"))
    manifest, latency = read(out / "package" / "manifest.json"), read(out / "latency.json")
    (task,) = manifest["tasks"].values()
    error = max(task["parity"]["relative_error"].values())
    ms = {row["name"]: f"{row['p50_ms']:.1f} ms" for row in latency["rows"]}
    adapter = (out / "capaboost" / "adapter.safetensors").stat().st_size
    rows = [
        ("dsprites_loc, dSprites-like (procedural)", "head only", "CapaBoost-LoRA"),
        ("---", "---", "---"),
        (f"test accuracy, {adapted['images']:,} images", *(_accuracy(r) for r in (head, adapted))),
        ("trained values, without the head", *(f"{r['trained_parameters']:,}" for r in (head, adapted))),
        ("training seconds", *(f"{r['seconds_training']:.0f}" for r in (head, adapted))),
        ("adapter file", "", f"{adapter / 1024:.0f} KB"),
        ("ONNX model", "", f"{manifest['files']['model.onnx']['bytes'] / 1e6:.1f} MB"),
        ("ONNX against PyTorch, relative error", "", f"{error:.1e}"),
        ("latency of one image, ONNX Runtime / PyTorch", "", f"{ms['float32']} / {ms['pytorch']}"),
        ("the whole demo", "", f"{seconds:.0f} s"),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _accuracy(result: dict[str, Any]) -> str:
    low, high = result["interval95"]
    return f"{result['accuracy']:.1f} % ({low:.1f} … {high:.1f})"


def main() -> None:
    """Run the commands, then print the table and where everything is."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    start = time.perf_counter()
    free = (Path("runs") / (f"demo-{n}" if n else "demo") for n in count())
    out = next(folder for folder in free if not folder.exists())
    where = ["--out", str(out), "--name"]
    run("vtab.train", *TASK, "--method", "linear_probe", *BUDGET, *where, "head-only")
    run("vtab.train", *TASK, *CAPABOOST, *BUDGET, *where, "capaboost")
    package, images = str(out / "package"), out / "images"
    run("export", str(out / "capaboost"), "--out", package)
    run("export.verify", package)
    run("export.bench", package, "--run", str(out / "capaboost"), "--no-memory", "--json", str(out / "latency.json"))
    run("vtab.data", "write", "--task", "dsprites_loc", "--test-limit", "4", "--out", str(images))
    run("export.predict", package, "--top", "2", *map(str, sorted((images / "dsprites_loc/images/test").iterdir())))
    summary = table(out, time.perf_counter() - start)
    (out / "table.md").write_text(summary + "\n")
    print(f"\n{summary}\n")
    made = {
        "adapter file": "capaboost/adapter.safetensors",
        "ONNX package": "package",
        "predictions on test images": "capaboost/predictions.png",
        "learning curve": "capaboost/curve.png",
        "this table": "table.md",
    }
    for what, path in made.items():
        print(f"{what:<28} {out / path}")


if __name__ == "__main__":
    main()
