"""`alula gate`: exit code 1 when a tuned model lost what the model before could do, by predictions that are stored."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from alula.evaluation.paired import Meter, Pairs

LABELS = {"base_forgetting": "base forgetting", "base_bits_increase": "base bits increase"}


def gate(
    base: Annotated[Path, typer.Argument(help="Predictions before: a .jsonl file, a folder of them, or a run folder with --cell.")],
    tuned: Annotated[Path | None, typer.Argument(help="Predictions after, of the same samples. Not with --cell.")] = None,
    cell: Annotated[str | None, typer.Option(help="A cell of the run folder: its first row against its last.")] = None,
    arm: Annotated[str | None, typer.Option(help="The arm of the cell, if it has several.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Compare this task. May be repeated. Default: all, or a run's base tasks.")] = None,
    max_base_forgetting: Annotated[float, typer.Option(help="Points of mean score that may be lost.", min=0)] = 1.0,
    max_bits_increase: Annotated[float, typer.Option(help="Bits per byte by which prose may get worse.", min=0)] = 0.02,
    level: Annotated[float, typer.Option(help="Error rate of the one-sided test.", min=0.0001, max=0.5)] = 0.05,
    strict: Annotated[bool, typer.Option("--strict", help="Pass only if a loss above the limit is excluded; few samples fail.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two sets of stored predictions. Exit code 0: passed, 1: skill was lost, 2: they cannot be compared.

    By default it fails when the mean loss is above the limit by more than chance; a pass says which loss would have been seen.
    """
    from alula.errors import UserError

    if not math.isfinite(max_base_forgetting + max_bits_increase):
        raise UserError("A limit is not a finite number. Give points to --max-base-forgetting, bits to --max-bits-increase.")
    if (tuned is None) == (cell is None):
        raise UserError("Two folders of predictions (BASE TUNED), or a run folder with --cell, are wanted. Give one or the other.")
    if cell is None and arm is not None:
        raise UserError(f"--arm {arm} came without --cell. Name the cell of the run folder, or leave --arm out.")
    before, after = (base, tuned) if tuned is not None else _rows_of_cell(base, str(cell), arm)
    from alula.evaluation.paired import judge, match

    pairs = match(_read(before), _read(after), tasks=task or _base_tasks(after))
    limits = {"base_forgetting": max_base_forgetting, "base_bits_increase": max_bits_increase}
    meters = judge(pairs, limits=limits, level=level, strict=strict)
    passed = all(meter.passed for meter in meters)
    said = [*(_sentence(meter, level=level, strict=strict) for meter in meters), *_hidden(pairs, meters, level=level)]
    verdict = f"{'PASS' if passed else 'FAIL'}{' (strict)' if strict else ''}: {' '.join(said)}"
    _show(pairs, meters, verdict, passed=passed, level=level, strict=strict, as_json=as_json)
    if not passed:
        raise typer.Exit(1)


def _rows_of_cell(run: Path, name: str, arm: str | None) -> tuple[Path, Path]:
    """The folders with the first and the last predictions of a cell.

    Raises:
        UserError: no such run, cell or arm, several arms and none named, or a cell that has not finished.
    """
    from alula.errors import UserError, nearest
    from alula.report.reading import read_run

    cells = {cell.name: cell for cell in read_run(run).cells}
    if name not in cells:
        raise UserError(f"{run} has no cell '{name}'. {nearest(name, cells)} Choose one with --cell.")
    cell = cells[name]
    if cell.state != "finished":
        raise UserError(f"The cell '{name}' is {cell.state}: its last row is not the end of the stream. Finish it with `alula run`.")
    chosen = arm or (cell.arms[0] if len(cell.arms) == 1 else "")
    if chosen not in cell.arms:
        came = f"has no arm '{arm}'" if arm else "was used in several ways"
        raise UserError(f"The cell '{name}' {came}. {nearest(chosen, cell.arms)} Choose one with --arm.")
    last = max(row["row"] for row in cell.scores)
    before, after = (cell.predictions_path(row, way, "task").parent for row, way in ((0, "default"), (last, chosen)))
    return before, after


def _base_tasks(folder: Path) -> list[str] | None:
    """The base tasks, where `folder` is one row of a run's cell: what was learnt would hide what was lost. Else None."""
    from alula.errors import UserError
    from alula.files import read_jsonl

    home = folder.resolve()
    if not home.is_dir() or home.parent.parent.name != "predictions":
        return None
    scores = home.parents[2] / "scores.jsonl"
    named = list(dict.fromkeys(row["task"] for row in read_jsonl(scores) if row.get("is_base"))) if scores.exists() else None
    if named == []:
        raise UserError(f"The run of {folder} has no base tasks. Name the tasks to compare with --task.")
    return named


def _read(path: Path) -> list[dict]:
    """The predictions of a file, or of all files of a folder; without a ``task`` a row is of the task its file is named for.

    Raises:
        UserError: nothing there, a file that cannot be read, or rows that are not predictions.
    """
    from alula.errors import UserError
    from alula.files import read_jsonl

    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .jsonl file. Give the folder that `alula eval --out` wrote, or a run folder with --cell.")
    rows = [(file, {"task": file.stem, **row}) for file in files for row in read_jsonl(file)]
    for file, row in rows:
        if "id" not in row:
            raise UserError(f"{file} has a row with {', '.join(row)}; id, prompt, reference and score are wanted. Give predictions.")
    return [row for _, row in rows]


def _sentence(meter: "Meter", *, level: float, strict: bool) -> str:
    """What one meter says: the loss, its limit, and what the samples could show."""
    changed = f"{meter.changed} changed" if meter.changed else "not one changed"
    loss = f"{LABELS[meter.name].capitalize()} is {_shown(meter.loss, meter.unit)} {meter.unit} (n = {meter.num_samples}, {changed})"
    limit = f"the limit of {meter.limit:g}"
    tells = f" About {_rounded(meter.enough)} samples would tell." if meter.enough else ""
    if strict:
        sure = f"with {100 * (1 - level):g} % confidence"
        if meter.passed:
            return f"{loss} and, {sure}, at most {_shown(meter.upper, meter.unit)}: within {limit}."
        if meter.loss > meter.limit:
            return f"{loss}, above {limit}."
        up_to = f"up to {_shown(meter.upper, meter.unit)}" if math.isfinite(meter.upper) else "any loss"
        return f"{loss}, but {up_to} cannot be excluded {sure}, above {limit}.{tells}"
    if not meter.passed:
        return f"{loss}, above {limit} by more than chance (p {_p(meter.p_value)})."
    if meter.loss > meter.limit:
        chance = f"not by more than chance (p {_p(meter.p_value)}, at most {meter.level:g} is wanted)"
        return f"{loss}, above {limit}, but {chance}.{tells}{_visible(meter)}"
    return f"{loss}, within {limit}.{_visible(meter)}"


def _visible(meter: "Meter") -> str:
    """What a pass is worth."""
    if meter.unit != "points" and not meter.changed:
        return ""  # how far prose may move is not known where none moved
    if meter.smallest is None:
        return " No loss could have been seen: too few samples."
    smallest = _shown(meter.smallest, meter.unit)
    if meter.unit == "points" and meter.smallest > meter.base:
        return f" No loss could have been seen: it would have to be about {smallest}, but there were only {_shown(meter.base, meter.unit)}."
    return f" True losses from about {smallest} on would be seen four times in five, smaller ones may pass."


def _hidden(pairs: Sequence["Pairs"], meters: Sequence["Meter"], *, level: float) -> list[str]:
    """Tasks that lost more than the limit beyond chance (Bonferroni over the tasks) while the mean over tasks passed."""
    found = []
    for meter in meters:
        for one in (pair for pair in pairs if pair.task in meter.tasks and meter.passed and len(meter.tasks) > 1):
            loss = one.loss * _scale(one)
            if loss > meter.limit and one.p_value * len(pairs) <= level:
                found.append(f"But {one.task} alone lost {_shown(loss, meter.unit)} (p {_p(one.p_value)}): the mean hides it.")
    return found


def _show(
    pairs: Sequence["Pairs"], meters: Sequence["Meter"], verdict: str, *, passed: bool, level: float, strict: bool, as_json: bool
) -> None:
    if as_json:
        import json

        rows = [_whole(vars(meter)) for meter in meters]
        found = {"passed": passed, "strict": strict, "level": level, "verdict": verdict, "meters": rows}
        typer.echo(json.dumps(found | {"tasks": [_whole(_task(one)) for one in pairs]}, indent=2, ensure_ascii=False))
        return
    from alula.cli.screen import results

    results.print(_table(pairs, meters, level=level, strict=strict))
    results.print(verdict, markup=False, soft_wrap=True, style="bold green" if passed else "bold red")


def _table(pairs: Sequence["Pairs"], meters: Sequence["Meter"], *, level: float, strict: bool) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    rules = ("fails if a loss is above its limit by more than chance", "passes only if the bound (≤) of each loss is within its limit")
    table = Table(caption=f"Rule: {rules[strict]}; one-sided, level {level:g}. p of no loss; in the last rows of a loss within the limit.")
    for name in ("task", "n", "base", "tuned", "loss \\[95 %]", "lost/\ngained", "p"):
        table.add_column(name, justify="left" if name == "task" else "right", overflow="fold")
    for one in pairs:
        row = _task(one)
        base, tuned, loss, low, high = (_shown(row[key], row["unit"]) for key in ("base", "tuned", "loss", "low", "high"))
        name = escape(one.task) + ("\nbits per byte" if one.is_prose else "")
        table.add_row(name, str(one.num_samples), base, tuned, f"{loss} \\[{low}, {high}]", f"{one.lost}/{one.gained}", _p(one.p_value, ""))
    table.add_section()
    for meter in meters:
        worse = meter.loss if meter.unit != "points" else -meter.loss
        base, tuned, loss, upper = (_shown(x, meter.unit) for x in (meter.base, meter.base + worse, meter.loss, meter.upper))
        name = f"{LABELS[meter.name]}\nlimit {meter.limit:g} {meter.unit}"
        table.add_row(name, str(meter.num_samples), base, tuned, f"{loss}\n≤ {upper}", "", _p(meter.p_value, ""))
    return table


def _task(one: "Pairs") -> dict[str, Any]:
    """One task's row, in points or bits per byte."""
    scale, total, interval = _scale(one), one.weights.sum(), one.interval()
    return {
        "task": one.task,
        "unit": _unit(one),
        "num_samples": one.num_samples,
        "base": scale * float(one.base.sum() / total),
        "tuned": scale * float(one.tuned.sum() / total),
        "loss": scale * one.loss,
        "low": scale * interval.low if interval else None,
        "high": scale * interval.high if interval else None,
        "lost": one.lost,
        "gained": one.gained,
        "p_value": one.p_value,
        "test": "exact McNemar" if one.is_binary else "sign flips",
    }


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold: infinity becomes null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _scale(one: "Pairs") -> float:
    return 1.0 if one.is_prose else 100.0


def _unit(one: "Pairs") -> str:
    return "bits per byte" if one.is_prose else "points"


def _shown(value: float, unit: str) -> str:
    digits = 1 if unit == "points" else 3
    return f"{round(value, digits) + 0.0:.{digits}f}"  # never -0.0


def _p(value: float, sign: str = "= ") -> str:
    return "< 0.001" if value < 0.001 else f"{sign}{value:.3f}"


def _rounded(number: int) -> str:
    """A number of samples to two digits: more would promise too much."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return f"{-(-number // unit) * unit:,}"
