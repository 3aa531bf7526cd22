"""Runs as the rows of a table: grouped by method, task and seed, and never mixed where they do not compare."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from vtab.averages import VTAB, Average, averages
from vtab.evaluate import Accuracy
from vtab.runs import ACCURACY, Problem, Run, examples, metric
from vtab.tasks import GROUPS, TASKS


@dataclass(frozen=True)
class Cell:
    """One method's runs on one task, a seed each."""

    runs: tuple[Run, ...]

    @property
    def mean(self) -> float:
        return fmean(run.accuracy for run in self.runs)

    @property
    def std(self) -> float | None:
        """Of the seeds, n - 1 in the denominator; None for one seed."""
        return stdev(run.accuracy for run in self.runs) if len(self.runs) > 1 else None

    @property
    def examples(self) -> int:
        return min(examples(run.result) for run in self.runs)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of the mean on that many examples: seeds share them, so they do not add up. Where the
        metric is no accuracy, the mean of the seeds' intervals; None where these are not recorded."""
        if metric(self.runs[0].result) != ACCURACY:
            known = [run.result.get("score_interval95") for run in self.runs]
            return (fmean(low for low, _ in known), fmean(high for _, high in known)) if all(known) else None
        return Accuracy(round(self.mean * self.examples / 100), self.examples).interval

    @property
    def generated(self) -> bool:
        return any(run.generated for run in self.runs)

    @property
    def judged(self) -> tuple[object, ...]:
        """Number and kind of test examples, and the seeds: cells that differ here are not ranked."""
        tests = {run.result["data"].get("test_digest") for run in self.runs}
        seeds = tuple(run.seed for run in self.runs)
        return self.examples, self.generated, self.runs[0].variant, frozenset(tests), seeds


@dataclass
class Row:
    """A line of the table.

    method: its short label
    facets: what else the runs have in common, by name: rows differ in one of these
    cells: by task id
    label: method, and what sets this row apart from the others
    remarks: what else to know of all its runs
    """

    method: str
    facets: dict[str, str]
    cells: dict[str, Cell] = field(default_factory=dict)
    label: str = ""
    remarks: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells.values() for run in cell.runs]

    @property
    def unit(self) -> str:
        """What its runs are judged on."""
        return self.runs[0].unit

    @property
    def comparable(self) -> bool:
        """Whole test splits, looked at once: may it be called best?"""
        return all(run.honest and not run.tuning and not run.partial for run in self.runs)

    def averages(self) -> dict[str, Average]:
        """As `averages` of the cells' means, with their spread over seeds."""
        seeds = {tuple(run.seed for run in self.cells[task].runs) for task in self.cells if task in VTAB}
        shared = seeds.pop() if len(seeds) == 1 else ()
        by_seed = [
            averages({task: cell.runs[index].accuracy for task, cell in self.cells.items()})
            for index in range(len(shared))
        ]
        result = {}
        for name, mean in averages({task: cell.mean for task, cell in self.cells.items()}).items():
            tasks = GROUPS.get(name, VTAB)
            spread = [one[name].value for one in by_seed if one[name].value is not None]
            result[name] = Average(
                mean.value,
                mean.count,
                mean.of,
                stdev(spread) if len(spread) > 1 else None,
                sum(self.cells[task].generated for task in tasks if task in self.cells),
            )
        return result

    def parameters(self) -> tuple[int, int]:
        """Fewest and most trained parameters of its runs, the head aside."""
        counts = [run.result["trained_parameters"] for run in self.runs]
        return min(counts), max(counts)

    def seeds(self) -> tuple[int, int]:
        """Fewest and most seeds of a task."""
        counts = [len(cell.runs) for cell in self.cells.values()]
        return min(counts), max(counts)


def arrange(runs: Sequence[Run]) -> tuple[list[Row], list[Problem]]:
    """The rows, honest and final ones first, then by trained parameters; and the runs that another stands for."""
    problems: list[Problem] = []
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.method, *identity(run).values()].append(run)
    rows = []
    for same in groups.values():
        for facets, together in _split_variants(same):
            rows.append(Row(same[0].method, identity(together[0]) | facets))
            by_task: dict[str, dict[int, Run]] = defaultdict(dict)
            for run in together:
                kept = by_task[run.task].setdefault(run.seed, run)
                if kept is not run:
                    problems.append(Problem(run.folder, f"the same run as {kept.folder}, which is counted"))
            order = [*TASKS, *sorted(by_task.keys() - TASKS)]
            for task in (task for task in order if task in by_task):
                rows[-1].cells[task] = Cell(tuple(run for _, run in sorted(by_task[task].items())))
    usual = {"final", "honest"}
    rows.sort(key=lambda r: (not usual <= set(r.facets.values()), *r.parameters(), r.method, *r.facets.values()))
    for unit in {row.unit for row in rows}:
        _name([row for row in rows if row.unit == unit])
    return rows, problems


def identity(run: Run) -> dict[str, str]:
    """What the runs of a row have in common beside the method; rows that differ here are never one."""
    base, tuned = run.base, run.result.get("tuning")
    digest = None if base["weights"] == "random" else base["digest"]  # random weights come from each run's seed
    recipe, limit = run.result.get("recipe"), run.test_limit
    return {
        "unit": run.unit,
        "stage": f"judged on {run.watched}" if run.tuning else "final",
        "protocol": "honest" if run.honest else "paper protocol (best of test)",
        "model": str(base["model"]),
        "weights": f"weights {base['weights']}",
        "digest": f"digest {str(digest)[:12]}" if digest else "digest not recorded",
        "size": _size(run),
        "normalisation": f"normalisation {run.result.get('normalization') or 'model'}",
        "test": f"first {limit:,} test {run.unit}" if limit else "whole test split",
        "lists": "partial lists" if run.partial else "whole lists",
        "recipe": f"recipe {recipe}" if recipe else "no recipe",
        "settings": "tuned on val200" if tuned else "settings given",
    }


def _size(run: Run) -> str:
    """Of the input."""
    if run.text:
        return f"{run.text.get('max_length')} tokens"
    return f"{run.base['img_size'] or (run.result.get('preprocessing') or {}).get('size')} px"


def _split_variants(runs: Sequence[Run]) -> Iterable[tuple[dict[str, str], list[Run]]]:
    """Apart where runs of one task differ in settings, or where JPEG and lossless images would meet in one row."""
    differing: set[str] = set()
    facts = {id(run): _facts(run) for run in runs}
    by_task: dict[str, list[dict[str, str]]] = defaultdict(list)
    for run in runs:
        by_task[run.task].append(facts[id(run)])
    for same in by_task.values():
        names = {name for one in same for name in one}
        differing |= {name for name in names if len({one.get(name) for one in same}) > 1}
    if len({run.variant for run in runs} - {None}) > 1:
        differing.add("images")
    chosen, parts = sorted(differing), defaultdict(list)
    for run in runs:
        parts[tuple(facts[id(run)].get(name, "default") for name in chosen)].append(run)
    for values, together in parts.items():
        split = {
            name: value if name == "images" else f"{name.removeprefix('method.')} {value}"
            for name, value in zip(chosen, values, strict=True)
        }
        known = {run.variant for run in together} - {None}  # one at most, now
        yield ({"images": f"{known.pop()} images"} if known else {}) | split, together


def _facts(run: Run) -> dict[str, str]:
    """What runs of one task must share: settings, and the kind of image."""
    images = "generated images" if run.generated else f"{run.variant} images" if run.variant else "other images"
    return run.settings() | {"images": images}


def _name(rows: Sequence[Row]) -> None:
    """Label each row by what differs between these; a row that is no honest test is called so in any case."""
    usual = {"stage": "final", "protocol": "honest", "test": "whole test split", "lists": "whole lists"}
    names = list(dict.fromkeys(name for row in rows for name in row.facets))
    apart = {name for name in names if len({row.facets[name] for row in rows if name in row.facets}) > 1}
    for row in rows:
        unusual = {name for name, value in usual.items() if row.facets[name] != value}
        said = unusual & {"stage", "protocol"} | apart - (usual.keys() - unusual)
        row.label = ", ".join(
            [row.method, *(row.facets[name] for name in names if name in row.facets and name in said)]
        )
        row.remarks = [row.facets[name] for name in names if name in unusual - said]
