"""Every architecture of timm on the meta device: the default hosts of each method, and what training them costs.

    python -m benchmarks.architectures [--limit 20] [--methods lora,adapter] [--out docs/architectures.md]

No weights are made and nothing is computed; block adapters find their channels in a forward pass without data.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import capavision as cv
from benchmarks.tables import add_methods, check_methods, measured, row, table
from vtab.cli import Parser, run
from vtab.textfile import write

COLUMNS = ("architecture", "family", "method", "hosts", "trained values", "result", "s")


@dataclass(frozen=True)
class Row:
    """One method with its defaults in one architecture; `result` is "ok", "refused: …" or "FAILED: …"."""

    architecture: str
    family: str
    method: str
    result: str
    seconds: float
    hosts: int = 0
    trained: int = 0

    @property
    def cells(self) -> tuple[object, ...]:
        counts = (self.hosts, f"{self.trained:,}") if self.result == "ok" else ("", "")
        return (self.architecture, self.family, self.method, *counts, self.result, f"{self.seconds:.1f}")


def architectures() -> dict[str, str]:
    """Every architecture and its family, families in order."""
    return {name: family for family in timm.list_modules() for name in timm.list_models(module=family)}


def sweep(names: Sequence[str], methods: Sequence[str]) -> Iterator[Row]:
    """The rows in order, each as soon as it is known."""
    families = architectures()
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10)
        for method in methods:
            start = time.perf_counter()
            result, report = attempt(model, cv.Method.known[method]())
            counts = (len(report.hosts), report.trained) if report else ()
            yield Row(name, families[name], method, result, time.perf_counter() - start, *counts)


def attempt(model: nn.Module, method: cv.Method, example: Any = None) -> tuple[str, cv.Report | None]:
    """Inject, take the report, remove."""
    try:
        report = cv.inject(model, method, example=example)
    except ValueError as error:
        return f"refused: {error}", None
    except Exception as error:  # whatever goes wrong in one architecture is its row, and the sweep goes on
        return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}", None
    cv.remove(model)
    return "ok", report


def summary(rows: Sequence[Row]) -> str:
    """One line per family and method: how many architectures, and the span of hosts and trained values."""
    lines = []
    for family, method in dict.fromkeys((r.family, r.method) for r in rows):
        mine = [r for r in rows if (r.family, r.method) == (family, method)]
        good = [r for r in mine if r.result == "ok"]
        spans = (span([r.hosts for r in good]), span([r.trained for r in good]))
        lines.append((family, method, len(mine), len(good), *spans))
    return table(("family", "method", "architectures", "ok", "hosts", "trained values"), lines)


def totals(rows: Sequence[Row]) -> str:
    """One line per method."""
    lines = []
    for name in dict.fromkeys(r.method for r in rows):
        results = [r.result.partition(":")[0] for r in rows if r.method == name]
        method = f"`{cv.Method.known[name]()}`"
        lines.append((method, len(results), *(results.count(word) for word in ("ok", "refused", "FAILED"))))
    return table(("method", "architectures", "ok", "refused", "failed"), lines)


def troubles(rows: Sequence[Row]) -> str:
    """What was refused and why; architectures that share a family and a sentence share a line."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for r in rows:
        if r.result != "ok":
            found.setdefault((r.method, r.family, r.result), []).append(r.architecture)
    lines = [(method, family, ", ".join(names), result) for (method, family, result), names in found.items()]
    return table(("method", "family", "architectures", "result"), lines) if lines else "None."


def span(values: Sequence[int]) -> str:
    """The least and the greatest: "12", "4 … 48", "" for none."""
    low, high = min(values, default=None), max(values, default=None)
    return "" if low is None else f"{low:,}" if low == high else f"{low:,} … {high:,}"


def document(rows: Sequence[Row], command: str, seconds: float) -> str:
    """What --out writes."""
    return f"""# Architectures of timm

All {len({r.architecture for r in rows}):,} architectures, built on the meta device with 10 classes; each method
with its default settings on its default hosts. Trained values are those of the deltas, the classifier not counted.

{measured(command, seconds)}

{totals(rows)}

## Refused

{troubles(rows)}

## By family

{summary(rows)}
"""


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the sweep, print a row as each is known, write the document."""
    args = parse(argv)
    start, rows = time.perf_counter(), []
    print(table(COLUMNS, []), flush=True)
    for found in sweep(list(architectures())[: args.limit], args.methods.split(",")):
        rows.append(found)
        print(row(found.cells), flush=True)
    print(f"\n{totals(rows)}\n\n{troubles(rows)}")
    if args.out:
        command = f"python -m benchmarks.architectures --methods {args.methods}"
        write(args.out, document(rows, command, time.perf_counter() - start))
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; methods are checked before anything runs."""
    parser = Parser(prog="python -m benchmarks.architectures", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N architectures")
    add_methods(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a summary there, with date and versions")
    return check_methods(parser.parse_args(argv))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(main)
