"""`alula recommend`: which method suits one's own tasks, by a short pilot."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from alula.running.recommend import Recommendation

BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SECONDS = {"S": 1.0, "MIN": 60.0, "M": 60.0, "H": 3600.0, "D": 86400.0}


def recommend(
    task: Annotated[list[str], typer.Option(help="A built-in task, or name=file.jsonl, in the order of learning. May be repeated.")],
    out: Annotated[Path, typer.Option(help="Where the pilot, the numbers and recipe.yaml go.")],
    model: Annotated[str, typer.Option(help="The base model: smol, a folder, or a name on the hub.")] = "smol",
    base_task: Annotated[
        list[str] | None, typer.Option(help="What the base model can do and should not forget, as --task. May be repeated.")
    ] = None,
    keep_old_data: Annotated[
        bool, typer.Option("--keep-old-data/--no-old-data", help="Whether samples of earlier tasks may be kept and learnt again.")
    ] = False,
    memory: Annotated[str | None, typer.Option(help="Memory that training may take, one batch included: 16GB. Default: any.")] = None,
    time: Annotated[str | None, typer.Option(help="Time that training may take in full: 90min, 2h. Default: any.")] = None,
    max_base_forgetting: Annotated[float, typer.Option(help="Points of mean score on base tasks that may be lost.", min=0)] = 1.0,
    pilot_size: Annotated[int, typer.Option(help="Samples of each task at most in the pilot.", min=1)] = 64,
    pilot_steps: Annotated[int, typer.Option(help="Optimizer steps of each task in the pilot.", min=1)] = 10,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of the full training: steps=200. May be repeated.")] = None,
) -> None:
    """Try the methods that fit on a part of the data, and recommend one with the numbers that led to it.

    Exit code 1: none can be recommended within the limits. The same command goes on where it was stopped.
    """
    from alula.cli.arguments import quoted, task_choice
    from alula.cli.screen import progress, results, say
    from alula.config import check_train, parse_settings

    settings = check_train(parse_settings(set_ or []))
    size, seconds = read_amount(memory, BYTES, option="--memory", example="16GB"), read_amount(time, SECONDS, option="--time", example="2h")
    tasks, base_tasks = ([task_choice(entry) for entry in entries] for entries in (task, base_task or []))
    from alula.running.candidates import RULE, Limits
    from alula.running.recommend import recommend as run

    memory_limit = None if size is None else int(size)
    limits = Limits(keeps_old_data=keep_old_data, memory=memory_limit, seconds=seconds, base_forgetting=max_base_forgetting)

    with progress() as bar:
        found = run(
            tasks, folder=out, limits=limits, model=model, base_tasks=base_tasks, settings=settings, pilot_size=pilot_size,
            pilot_steps=pilot_steps, progress=bar, say=say,
        )  # fmt: skip
    results.print(lines_table(found))
    for line in found.lines:
        if why := line.out or line.unsure:
            results.print(f"{line.name} is {line.verdict}: it {why}.", markup=False, soft_wrap=True)
    results.print("\n".join(found.sentences), markup=False, soft_wrap=True)
    say(f"The rule: {RULE}")
    if found.recipe is None:
        raise typer.Exit(1)
    results.print(f"Recipe: alula run {quoted(found.recipe)}", markup=False, soft_wrap=True)


def read_amount(text: str | None, units: dict[str, float], *, option: str, example: str) -> float | None:
    """``16GB`` or ``1.5 h`` as a number in the smallest unit; None for None.

    Raises:
        UserError: no number above zero, or another unit.
    """
    from alula.errors import UserError

    if text is None:
        return None
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if not parts or parts[2].upper() not in units or not float(parts[1]):
        raise UserError(f"'{text}' came for {option}; a number and one of {', '.join(units)} is wanted, as in {option} {example}.")
    return float(parts[1]) * units[parts[2].upper()]


def lines_table(found: "Recommendation") -> "Table":
    """One row per method: what the pilot measured, what the full run would take, and whether it fits the limits."""
    from rich.table import Table

    from alula.report.format import show, show_bytes, show_interval, show_time

    table = Table("method", caption="points [95 % interval over test samples]; time and memory of the full training, estimated")
    for heading in ("average score", "base forgetting", "time", "memory"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for line in found.lines:
        score = f"{show(100 * line.score)}\n{show_interval(line.score_interval)}\nn = {line.num_samples}" if line.num_samples else "–"
        lost = f"{show(100 * line.lost)}\n{show_interval(line.lost_interval)}\nn = {line.num_base}" if line.num_base else "–"
        verdict = "recommended" if line.name == found.chosen else line.verdict
        cells = (line.name, score, lost, show_time(line.seconds), show_bytes(line.memory), verdict)
        table.add_row(*(cell.replace("[", "\\[") for cell in cells))
    return table
