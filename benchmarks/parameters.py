"""Trained values of each method on a ViT-B/16, head excluded: python -m benchmarks.parameters.

Nothing is stored or computed: the model lives on the meta device. "expected" is the equation of the method's paper
worked out for 12 blocks of width 768; where we know a printed figure, it stands beside it. Of learned masks the
equation counts what is stored: a prototype that all hosts share, and a bit, 1/32 of a value, for each score.
"""

from dataclasses import asdict

import timm
import torch

import capavision as cv
from benchmarks.tables import table
from vtab.cli import Parser, run

D, L = 768, 12
# method, where it goes (None: its default hosts), the equation's count, a published figure and who prints it
ROWS = [
    (cv.LoRA(rank=8), "q, v", L * 2 * 8 * 2 * D, "0.29 M (V-PETL Bench)"),
    (cv.LoRA(rank=8, branches=2), "q, v", L * 2 * 8 * 2 * D, ""),
    (cv.LoRA(rank=1), "q, v", L * 2 * 2 * D, ""),
    (cv.Adapter(rank=8), "after each block", L * (2 * D * 8 + 8 + D), ""),
    (cv.Adapter(rank=8, where="houlsby", activation="silu"), "attention, MLP", 2 * L * (2 * D * 8 + 8 + D), ""),
    (cv.Prefix(length=10), "each attention", L * 10 * 2 * D, ""),
    (cv.LoRA(rank=32, alpha=48.0, density=0.1, masks="learned"), "q, v", 2 * 32 * 2 * D + L * 2 * 32 * 2 * D // 32, ""),
    (cv.Adapter(rank=64, masks="learned"), "after each block", 2 * D * 64 + L * (64 + D) + L * 2 * D * 64 // 32, ""),
    (cv.Circulant(product=True), "q, v", L * 2 * 2 * D, ""),
    (cv.Circulant(), "q, v", L * 2 * D, ""),
    (cv.Toeplitz(kind="symmetric", product=True), "q, v", L * 2 * 2 * D, ""),
    (cv.Toeplitz(), "q, v", L * 2 * (2 * D - 1), ""),
    (cv.Kronecker(split=32), "q, v", L * 2 * 2 * D, ""),
    (cv.LDR(rank=1), "q, v", L * 2 * 2 * D, ""),
    (cv.LDR(rank=2), "q, v", L * 2 * 2 * D * 2, ""),
    (cv.Circulant(product=True, where="houlsby"), "attention, MLP", 2 * L * 3 * D, ""),
    (cv.BitFit(), "every bias", L * 11 * D + 2 * D, ""),
    (cv.Full(), "everything", 85_798_656, ""),
]


def spelt(method: cv.Method) -> str:
    """The method with the fields that differ from its defaults.

    >>> spelt(cv.LoRA(rank=1)), spelt(cv.LoRA(density=0.1, masks="learned"))
    ('LoRA(rank=1)', "LoRA(masks='learned', density=0.1)")
    """
    default, given = asdict(type(method)()), asdict(method)
    fields = {name: value for name, value in given.items() if value != default[name] and name != "density"}
    if "density" in given and given["density"] != type(method)(**fields).density:  # whose default follows from others
        fields["density"] = given["density"]
    return f"{type(method).__name__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


def main(argv: list[str] | None = None) -> None:
    """Print the table; a count that differs from its equation is an error."""
    Parser(prog="python -m benchmarks.parameters", description=__doc__.partition(":")[0]).parse_args(argv)
    rows = []
    for method, hosts, expected, published in ROWS:
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224", num_classes=100)
            report = cv.inject(model, method)
        if report.stored != expected:
            raise SystemExit(f"{method}: {report.stored:,} values, but its equation gives {expected:,}")
        found = f"{report.stored:,} stored, {report.trained:,} trained" if report.scores else f"{report.trained:,}"
        rows.append((f"`{spelt(method)}`", hosts, found, published))
    print(table(("method", "hosts", "trained values, as its equation says", "published"), rows))


if __name__ == "__main__":
    run(main)
