"""What was run, in a few words, for the head of a page; what the folder does not tell is left out."""

from collections.abc import Iterable, Sequence

from alula.report.format import show, show_amount, show_time
from alula.report.prompts import prompt_fact
from alula.report.reading import Cell, Row, Run
from alula.report.series import Series, all_joint

MACHINE_WORDS = ("machine", "cpu", "gpu", "device", "platform", "cores")
PROGRAMS = ("alula", "torch", "transformers", "python")


def facts_of(run: Run, series: Sequence[Series]) -> list[tuple[str, str]]:
    """What and how long was learnt and tested, by whom, how often and on which machine."""
    members = [member for one in series for member in one.members]
    first = members[0] if members else None
    orders = {member.cell.order: member.matrix.tasks for member in members}
    learnt, between = ("Tasks, all at once", ", ") if all_joint(series) else ("Orders" if len(orders) > 1 else "Tasks, in order", " → ")
    states = {state: sum(cell.state == state for cell in run.cells) for state in ("finished", "crashed", "unfinished")}
    samples = int(first.matrix.counts.sum()) if first else 0
    facts = [
        ("Model", run.model),
        (learnt, "; ".join(between.join(orders[order]) for order in sorted(orders))),
        ("Base tasks", ", ".join(name for name in first.matrix.base_tasks if name not in first.cell.shots) if first else ""),
        ("Examples in prompts", _shots(first.cell) if first else ""),
        ("Methods", ", ".join(dict.fromkeys(cell.method for cell in run.cells))),
        ("Seeds", ", ".join(str(seed) for seed in sorted({cell.seed for cell in run.cells}))),
        ("Cells", ", ".join(f"{count} {state}" for state, count in states.items() if count)),
        ("Steps a task", _span(_per_task(series, "steps"))),
        ("Samples seen a task", _span(_per_task(series, "samples_seen"))),
        ("Batch size", _span(_batch_sizes(run))),
        ("Test samples", f"{samples} a row of the matrix" if samples else ""),
        ("Training, all cells", _total(row for cell in run.cells for row in cell.cost)),
        ("Evaluation, all cells", _total(row for cell in run.cells for row in cell.scores)),
        ("Machine", ", ".join(str(value) for key, value in run.versions.items() if any(word in key.lower() for word in MACHINE_WORDS))),
        ("Versions", ", ".join(f"{name} {run.versions[name]}" for name in PROGRAMS if name in run.versions)),
        ("Prompts", prompt_fact(run.cells)),
    ]
    return [(label, text) for label, text in facts if text]


def _shots(cell: Cell) -> str:
    """With how many examples tasks were asked, and where there was no room for all, or there were no more."""
    fewer = [f"{name} got {show(row['shots_given'])}" for name, row in cell.shots.items() if row["shots_given"] < row["shots"]]
    return "; ".join([", ".join(str(shots) for shots in sorted({row["shots"] for row in cell.shots.values()})), *fewer])


def _per_task(series: Sequence[Series], key: str) -> list[float]:
    """A number of each line of cost.jsonl; what was learnt all at once is divided by its tasks."""
    members = [member for one in series for member in one.members]
    costs = [
        (row[key], member.matrix.num_learnt if member.is_single_stage else 1)
        for member in members
        for row in member.cell.cost
        if row.get(key)
    ]
    return [value / tasks for value, tasks in costs]


def _batch_sizes(run: Run) -> list[float]:
    """That of the recipe, and those that single methods have instead."""
    methods = run.recipe.get("methods")
    parts = [run.recipe, *(entry for entry in (methods if isinstance(methods, list) else []) if isinstance(entry, dict))]
    sizes = [part["train"].get("batch_size") for part in parts if isinstance(part.get("train"), dict)]
    return [size for size in sizes if size]


def _span(values: Sequence[float]) -> str:
    """``40``, or ``40 to 60`` where they differ."""
    return " to ".join(dict.fromkeys(show_amount(end) for end in (min(values), max(values)))) if values else ""


def _total(rows: Iterable[Row]) -> str:
    seconds = sum(row.get("seconds") or 0 for row in rows)
    return show_time(seconds) if seconds else ""
