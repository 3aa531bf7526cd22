"""The report as one HTML file that asks nothing of the network: Jinja2 escapes every text, pictures are inside."""

import base64
import datetime
from collections.abc import Sequence
from importlib import resources
from typing import Any

from export.cli import printable
from vtab import charts, mistakes, tables
from vtab.averages import VTAB
from vtab.published import Published, published
from vtab.rows import Row
from vtab.runs import ACCURACY, Problem, Run, examples, in_full_split, metric
from vtab.textfile import LIMIT

PNG = b"\x89PNG\r\n\x1a\n"


def render(rows: Sequence[Row], beside: Sequence[Published], problems: Sequence[Problem]) -> str:
    """The page's text."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((resources.files("vtab") / "report.html.j2").read_text(encoding="utf-8"))
    runs = [run for row in rows for run in row.runs]
    blocks, tasks, units = tables.blocks(rows, beside), charts.tasks_of(rows), dict.fromkeys(row.unit for row in rows)
    return template.render(
        title=_title(tasks),
        made=f"{datetime.datetime.now(datetime.UTC):%d %B %Y, %H:%M} UTC",
        runs=runs,
        rows=rows,
        problems=[(printable(str(problem.folder)), printable(problem.text)) for problem in problems],
        blocks=blocks,
        names={name: tables.paper_name(name) for block in blocks for name in block.columns} | tables.MEANS,
        generated=tables.GENERATED if any(run.generated for run in runs) else "",
        pictures=[_pictures([row for row in rows if row.unit == unit], beside) for unit in units],
        tasks=[_task(task, rows) for task in tasks],
        facts=[_facts(row) for row in rows],
        published=published() if any(block.averages for block in blocks) else (),
    )


def _title(tasks: Sequence[str]) -> str:
    """Which tasks the report is on."""
    if set(tasks) & set(VTAB):
        return "VTAB-1k report"
    return f"Report on {tasks[0] if len(tasks) == 1 else f'{len(tasks)} tasks'}"


def _pictures(rows: Sequence[Row], beside: Sequence[Published]) -> dict[str, Any]:
    """The charts of rows that are judged on the same kind of examples, and what their axes show."""
    return {
        "unit": rows[0].unit,
        "judged": tables.judged_by(rows, charts.tasks_of(rows)),
        "bars": _uri(charts.bars(rows, beside)),
        "curves": _uri(charts.curves(rows)),
        "parameters": _uri(charts.against_parameters(rows, beside)),
    }


def _uri(picture: bytes | None) -> str | None:
    if picture is None:
        return None
    kind = "png" if picture.startswith(PNG) else "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _task(task: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What the page shows of one task: of its best row's first run the confusions, test images, mistakes."""
    row = max((row for row in rows if task in row.cells), key=lambda row: (row.comparable, row.cells[task].mean))
    run = row.cells[task].runs[0]
    picture = run.folder / "predictions.png"
    shown = picture.read_bytes() if picture.is_file() and picture.stat().st_size < LIMIT else b""
    return {
        "name": tables.paper_name(task),
        "id": task,
        "label": row.label,
        "run": run,
        "figure": f"{run.accuracy:.1f} %{' of' if metric(run.result) == ACCURACY else ' on'} {_count(run)}",
        "generated": run.generated,
        "confusion": _uri(charts.confusion(run)) if run.labels is not None else None,
        "predictions": _uri(shown) if shown.startswith(PNG) else None,
        "mistakes": mistakes.of(run.folder),
        "lacking": _lacking(run, shown.startswith(PNG)),
    }


def _lacking(run: Run, shown: bool) -> list[str]:
    """The files that runs of its kind leave and this one does not have."""
    wanted = {
        "predictions.npz": run.labels is None and (run.unit == "images" or bool(run.classes)),
        "predictions.png": run.unit == "images" and not shown,
    }
    return [name for name, lacks in wanted.items() if lacks]


def _facts(row: Row) -> dict[str, Any]:
    """What stands behind a row: each fact once, or all its values where runs differ."""
    base = row.runs[0].base
    return {
        "label": row.label,
        "facts": {
            row.runs[0].unit: _each(row, lambda run: f"{run.task}: {_source(run)}"),
            "checkpoint": f"{base['model']}, weights {base['weights']}",
            "digest of the base": _each(row, lambda run: run.base["digest"] or "not recorded"),
            "input": _each(row, _input),
            "selection": _each(row, _selection),
            "test": _each(row, lambda run: f"{run.task}: {_judged(run)}"),
            "recipe": _each(row, _recipe),
            "settings": _each(row, _settings),
            "trained parameters": _each(row, lambda run: f"{run.result['trained_parameters']:,}"),
            "commit": _each(row, lambda run: _environment(run).get("commit") or "not recorded"),
            "versions": _each(row, _versions),
            "device": _each(row, lambda run: _environment(run).get("gpu") or _environment(run).get("device")),
            "seconds a run": _range(row, _seconds),
            "peak memory (MB)": _range(row, lambda run: _environment(run).get("peak_memory_mb")),
        },
    }


def _each(row: Row, fact: Any) -> list[str]:
    return list(dict.fromkeys(str(fact(run)) for run in row.runs))


def _range(row: Row, fact: Any) -> str:
    values = [value for run in row.runs if isinstance(value := fact(run), int | float)]
    if not values:
        return "not recorded"
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"


def _environment(run: Run) -> dict[str, Any]:
    return run.result.get("environment") or {}


def _source(run: Run) -> str:
    source = run.result["data"].get("source", "source not recorded")
    if run.apart:
        source += f" ({run.file})"
    return f"{source}, {tables.GENERATED}" if run.generated else f"{source}, {run.variant}" if run.variant else source


def _judged(run: Run) -> str:
    full, split = in_full_split(run.result), run.watched if run.tuning else "test"
    if full in (None, examples(run.result)):
        return f"{split}, {_count(run)}"
    return f"{split}, first {examples(run.result):,} of {full:,} {run.unit}"


def _count(run: Run) -> str:
    return f"{examples(run.result):,} {run.unit}"


def _input(run: Run) -> str:
    if run.text:
        return f"texts of at most {run.text.get('max_length')} tokens"
    how, name = run.result.get("preprocessing") or {}, run.result.get("normalization") or "model"
    return f"normalisation {name}: mean {how.get('mean')}, std {how.get('std')}, {how.get('size')} px"


def _selection(run: Run) -> str:
    rule = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in (run.result.get("selection") or {}).items())
    return rule + ("" if run.honest else "; PAPER PROTOCOL: the best of the test evaluations")


def _recipe(run: Run) -> str:
    unlike = run.result.get("recipe_differs") or []
    return f"{run.result.get('recipe') or 'none'}" + (f"; differs: {', '.join(map(str, unlike))}" if unlike else "")


def _settings(run: Run) -> str:
    names = ("epochs", "batch_size", "lr", "weight_decay", "warmup", "drop_path")
    given = ", ".join(f"{name.replace('_', ' ')} {run.config[name]}" for name in names if name in run.config)
    chosen = (run.result.get("tuning") or {}).get("chosen") or {}
    found = ", ".join(f"{name} {value}" for name, value in chosen.items())
    return f"{given}; {run.task}, seed {run.seed}: chosen on val200: {found}" if found else given


def _versions(run: Run) -> str:
    names = ("capavision", "torch", "timm", "transformers", "numpy", "python")
    return ", ".join(f"{name} {_environment(run)[name]}" for name in names if name in _environment(run))


def _seconds(run: Run) -> float | None:
    parts = [run.result.get(name) for name in ("seconds_training", "seconds_evaluation")]
    return sum(parts) if all(isinstance(part, int | float) for part in parts) else None
