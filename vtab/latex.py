"""The table as LaTeX, with booktabs' rules."""

from collections.abc import Sequence

from vtab.tables import MEANS, Block, Figure, Line, paper_name


def render(blocks: Sequence[Block]) -> str:
    """booktabs tables; need \\usepackage{booktabs, graphicx}. Our best of each column is bold."""
    return "\n".join(["% needs \\usepackage{booktabs, graphicx}", *map(_tabular, blocks)])


def _tabular(block: Block) -> str:
    names = [escape(name) for name in (*(MEANS.get(c) or paper_name(c) for c in block.columns), "Trained")]
    names = [f"\\rotatebox{{90}}{{{name}}}" if block.upright else name for name in names]
    body = []
    for index, line in enumerate(block.lines):
        if index and block.lines[index - 1].ours and not line.ours:
            body.append(r"\midrule")
        cells = [_figure(line.figures.get(column)) for column in block.columns]
        name = escape(line.label if line.ours else f"{line.label}, published")
        body.append(" & ".join([name, *cells, escape(line.parameters) or "--"]) + r" \\")
    return "\n".join(
        [
            r"\begin{table*}",
            f"\\caption{{{escape(' '.join([f'{block.heading}.', *block.notes]))}}}\\smallskip",
            r"\setlength{\tabcolsep}{2pt}\scriptsize\centering",
            rf"\begin{{tabular}}{{l{'c' * len(block.columns)}r}}",
            r"\toprule",
            *_over(block),
            " & ".join(["Method", *names]) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *_notes(block.lines),
            r"\end{table*}",
            "",
        ]
    )


def _over(block: Block) -> list[str]:
    """The line above the columns' names: which tasks are of one group."""
    if len(block.groups) < 2:
        return []
    groups, rules, start = [], [], 2
    for group, tasks in block.groups.items():
        groups.append(f"\\multicolumn{{{len(tasks)}}}{{c}}{{{group.capitalize()}}}")
        rules.append(f"\\cmidrule(lr){{{start}-{start + len(tasks) - 1}}}")
        start += len(tasks)
    means = f" & \\multicolumn{{{len(block.averages)}}}{{c}}{{Means}} & \\\\"
    return [" & " + " & ".join(groups) + means, "".join(rules)]


def _notes(table: Sequence[Line]) -> list[str]:
    """What to know before comparing, below the table."""
    said = [f"{line.label}: {line.remark}." for line in table if line.remark]
    return [f"\\par\\smallskip\\raggedright {escape(' '.join(said))}"] if said else []


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return "--"
    value = f"{figure.value:.1f}".replace("-", "$-$")
    value = f"\\textbf{{{value}}}" if figure.best else value
    spread = "" if figure.std is None else f"\\,{{\\tiny$\\pm${figure.std:.1f}}}"
    marks = escape(" ".join(part for part in (figure.mark, figure.caveat) if part))
    return value + (f"\\textsuperscript{{{marks}}}" if marks else "") + spread


def escape(text: str) -> str:
    """Text that LaTeX prints as it is.

    >>> print(escape("50 % of a_b"))
    50 \\% of a\\_b
    """
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    special |= {"^": r"\textasciicircum{}", "±": r"$\pm$", "≤": r"$\leq$", "×": r"$\times$", "–": "--", "…": r"\dots{}"}
    special |= {"[": "{[}", "*": "{*}"}  # of which \\ before them would make an argument
    return "".join(special.get(c, c) for c in " ".join(text.split()))
