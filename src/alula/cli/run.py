"""`alula run`: a whole stream, several methods, seeds and orders, one report."""

from pathlib import Path
from typing import Annotated

import typer

from alula.cli.launched import is_main, launched
from alula.errors import UserError

RecipeFile = Annotated[Path, typer.Argument(help="A YAML recipe: tasks, base tasks, methods, seeds, orders.")]
RunFolder = Annotated[Path | None, typer.Option(help="The run folder. Default: runs/<name of the recipe>.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change one value: train.steps=100. May be repeated.")]
Workers = Annotated[
    str | None,
    typer.Option(
        help="Cells at once, each in a process of its own: a number, or auto for what memory and cores allow. Default: 1; with --ray auto."
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Address of a Ray cluster that runs the cells. All its machines must see the run folder, the data and the model."),
]


def run(recipe: RecipeFile, out: RunFolder = None, set_: Changes = None, workers: Workers = None, ray: RayAddress = None) -> None:
    """Run a recipe. Resumable: the same command goes on where it was stopped and skips what is done."""
    folder, crashed = run_cells(recipe, out=out, changes=set_, workers=workers, ray=ray)
    if not is_main():
        return
    from alula.report import build_report

    show_results(folder, {"Report": build_report(folder)}, crashed)


def run_cells(recipe: Path, *, out: Path | None, changes: list[str] | None, workers: str | None, ray: str | None) -> tuple[Path, int]:
    """Runs what is not done yet; gives the run folder and the number of cells that crashed."""
    from alula.cli.screen import progress, say, silent
    from alula.config import read_recipe

    count = read_workers(workers, is_cluster=ray is not None)
    folder = out or Path("runs") / recipe.stem

    with launched() as asked, silent(not is_main()):
        wanted = read_recipe(recipe, changes=[*(changes or []), *(f"train.{setting}" for setting in asked)])
        from alula.running.run import run_recipe

        with progress() as bar:
            return folder, run_recipe(wanted, folder, progress=bar, say=say, workers=count, ray=ray)


def read_workers(text: str | None, *, is_cluster: bool = False) -> int | None:
    """What ``--workers`` says: a number, or None for ``auto``. Left out it is 1, on a cluster ``auto``.

    Raises:
        UserError: neither.
    """
    text = text or ("auto" if is_cluster else "1")
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"'{text}' came for --workers; a number of processes (1 or more) or auto is wanted, as in --workers 2.")
    return int(text)


def show_results(folder: Path, pages: dict[str, Path], crashed: int) -> None:
    """The summary, the pages, and exit code 1 if a cell crashed."""
    from alula.cli.screen import results
    from alula.cli.tables import summary_table

    results.print(summary_table(folder))
    for label, page in pages.items():
        results.print(f"{label}: {page}", markup=False, soft_wrap=True)
    fail_if(crashed, page="report")


def fail_if(crashed: int, *, page: str) -> None:
    """Exit code 1, with a word, if a cell crashed."""
    from alula.cli.screen import say

    if crashed:
        cells = "1 cell" if crashed == 1 else f"{crashed} cells"
        say(f"{cells} crashed; the {page} says why. The same command again tries only what is not done.")
        raise typer.Exit(1)
