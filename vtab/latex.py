"""The table as LaTeX, with booktabs' rules."""

from collections.abc import Sequence

from vtab.averages import AVERAGES, VTAB
from vtab.tables import MEANS, Figure, Line, having, paper_name
from vtab.tasks import GROUPS


def render(table: Sequence[Line], more: Sequence[str], caption: str) -> str:
    """A booktabs table; needs \\usepackage{booktabs, graphicx}. Our best of each column is bold."""
    inside, published = having(table, VTAB), [line for line in table if not line.ours]
    parts = [_tabular([*inside, *published], [*VTAB, *AVERAGES], caption)] if inside else []
    if more:
        parts.append(_tabular(having(table, more), more, "Tasks that are not part of VTAB-1k."))
    return "\n".join(["% needs \\usepackage{booktabs, graphicx}", *parts])


def _tabular(table: Sequence[Line], columns: Sequence[str], caption: str) -> str:
    names = [f"\\rotatebox{{90}}{{{escape(MEANS.get(c) or paper_name(c))}}}" for c in columns]
    groups, rules, start = [], [], 2
    for group, tasks in GROUPS.items():
        if tasks[0] in columns:
            groups.append(f"\\multicolumn{{{len(tasks)}}}{{c}}{{{group.capitalize()}}}")
            rules.append(f"\\cmidrule(lr){{{start}-{start + len(tasks) - 1}}}")
            start += len(tasks)
    over = [" & " + " & ".join(groups) + f" & \\multicolumn{{{len(AVERAGES)}}}{{c}}{{Means}} & \\\\", "".join(rules)]
    body = []
    for index, line in enumerate(table):
        if index and table[index - 1].ours and not line.ours:
            body.append(r"\midrule")
        cells = [_figure(line.figures.get(column)) for column in columns]
        name = escape(line.label if line.ours else f"{line.label}, published")
        body.append(" & ".join([name, *cells, escape(line.parameters) or "--"]) + r" \\")
    return "\n".join(
        [
            r"\begin{table*}",
            f"\\caption{{{escape(caption)}}}\\smallskip",
            r"\setlength{\tabcolsep}{2pt}\scriptsize\centering",
            rf"\begin{{tabular}}{{l{'c' * len(columns)}r}}",
            r"\toprule",
            *(over if groups else []),
            " & ".join(["Method", *names, r"\rotatebox{90}{Trained}"]) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *_notes(table),
            r"\end{table*}",
            "",
        ]
    )


def _notes(table: Sequence[Line]) -> list[str]:
    """What to know before comparing, below the table."""
    said = [f"{line.label}: {line.remark}." for line in table if line.remark]
    return [f"\\par\\smallskip\\raggedright {escape(' '.join(said))}"] if said else []


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return "--"
    value = f"\\textbf{{{figure.value:.1f}}}" if figure.best else f"{figure.value:.1f}"
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
    return "".join(special.get(c, c) for c in text)
