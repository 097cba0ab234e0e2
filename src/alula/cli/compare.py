"""`alula compare`: methods x seeds x orders on one stream, and one page that says which differences are more than noise."""

from pathlib import Path
from typing import Annotated

import typer

from alula.cli.run import CHANGES, OUT, RAY, RECIPE, WORKERS, run_cells, show_results


def compare(
    recipe: Annotated[Path, typer.Argument(help=RECIPE)],
    out: Annotated[Path | None, typer.Option(help=OUT)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help=CHANGES)] = None,
    workers: Annotated[str | None, typer.Option(help=WORKERS)] = None,
    ray: Annotated[str | None, typer.Option(help=RAY)] = None,
) -> None:
    """Run a recipe as `alula run` does, then build the comparison page (compare.html) beside the report."""
    folder, crashed = run_cells(recipe, out=out, changes=set_, workers=workers, ray=ray)
    from alula.report import build_report
    from alula.report.comparison import build_comparison

    pages = {"Report": build_report(folder), "Comparison": build_comparison(folder)}
    show_results(folder, pages, crashed)
