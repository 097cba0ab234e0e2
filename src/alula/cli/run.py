"""`alula run`: a whole stream, several methods and seeds, one comparison."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: tasks, base tasks, methods, seeds.")],
    out: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/<name of the recipe>.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change one value: train.steps=100. May be repeated.")] = None,
) -> None:
    """Run a recipe. Resumable: the same command goes on where it was stopped and skips what is done."""
    from alula.cli.screen import notes, progress, results
    from alula.config import read_recipe

    wanted = read_recipe(recipe, changes=set_)
    folder = out or Path("runs") / recipe.stem
    from alula.report import build_report
    from alula.running.run import run_recipe

    with progress() as bar:
        crashed = run_recipe(wanted, folder, progress=bar, say=lambda line: notes.print(line, markup=False, soft_wrap=True))
    page = build_report(folder)
    from alula.cli.tables import summary_table

    results.print(summary_table(folder))
    results.print(f"Report: {page}", markup=False, soft_wrap=True)
    if crashed:
        cells = "1 cell" if crashed == 1 else f"{crashed} cells"
        notes.print(f"{cells} crashed; the report says why. The same command again tries only what is not done.", soft_wrap=True)
        raise typer.Exit(1)
