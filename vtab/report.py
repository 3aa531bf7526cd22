"""What runs found, in one table and one page: python -m vtab.report runs/.

Rows are methods, columns tasks: VTAB-1k's nineteen, and apart from them those of other images, of texts and of
questions. Runs that do not compare (another protocol, checkpoint, normalisation, kind of image, part of the test split)
become rows of their own, whose labels say what differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vtab import cli, latex, page, tables, terminal
from vtab.averages import VTAB
from vtab.gather import read_all
from vtab.published import Published, choose
from vtab.rows import Row, arrange
from vtab.runs import Problem
from vtab.textfile import write


@dataclass(frozen=True)
class Report:
    """All that a table or page shows: our rows, published ones beside them, and what could not be used."""

    rows: Sequence[Row]
    beside: Sequence[Published]
    problems: Sequence[Problem]


def main(argv: list[str] | None = None) -> Report:
    """Print the table, write report.html, table.csv and table.tex."""
    parser = cli.Parser(prog="python -m vtab.report", description=" ".join((__doc__ or "").split("\n\n")[1].split()))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of run folders, at any depth")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: RUNS/report)")
    names = "names of published rows, with commas; all, or none (default: a few beside runs on VTAB-1k)"
    parser.add_argument("--beside", metavar="NAMES", help=names)
    args = parser.parse_args(argv)
    beside = choose(args.beside)
    runs, problems = read_all(args.runs)
    rows, doubled = arrange(runs)
    if args.beside is None and not any(task in VTAB for row in rows for task in row.cells):
        beside = []
    report = Report(rows, beside, [*problems, *doubled])
    out = args.out or args.runs[0] / "report"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    blocks = tables.blocks(rows, beside)
    write(out / "table.csv", tables.as_csv(tables.lines(rows, beside), blocks))
    write(out / "table.tex", latex.render(blocks))
    write(out / "report.html", page.render(rows, beside, report.problems))
    terminal.show(blocks, report.problems)
    print(f"{out / 'report.html'}\n{out / 'table.csv'}\n{out / 'table.tex'}")
    return report


if __name__ == "__main__":
    cli.run(main)
