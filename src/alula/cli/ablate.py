"""`alula ablate`: a grid over the parts and settings of a recipe, and one page that says which of them matter."""

from pathlib import Path
from typing import Annotated

import typer

from alula.cli.run import Changes, RayAddress, RunFolder, Workers, fail_if, read_workers


def ablate(
    grid: Annotated[Path, typer.Argument(help="A YAML recipe with a key grid: the factors and their levels.")],
    out: RunFolder = None,
    set_: Changes = None,
    workers: Workers = None,
    ray: RayAddress = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the effects as Markdown tables too.")] = False,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Run what is not done yet, or only build the page of what is.")] = True,
) -> None:
    """Run every point of a grid, then build the page of main effects (ablate.html). Resumable, cell by cell."""
    from alula.cli.screen import progress, results, say

    folder, crashed = out or Path("runs") / grid.stem, 0
    count = read_workers(workers, is_cluster=ray is not None)
    if run:
        from alula.running.ablate import run_grid
        from alula.running.grid import read_grid

        with progress() as bar:
            wanted = read_grid(grid, changes=set_)
            say(f"{len(wanted.points)} points, each of them checked")
            crashed = run_grid(wanted, folder, progress=bar, say=say, workers=count, ray=ray)
    from alula.report.ablation import ablation_tables, build_ablation, damaged_files

    page = build_ablation(folder)
    for problem in damaged_files(folder):
        say(f"damaged, and in no effect: {problem}")
    if markdown:
        typer.echo(ablation_tables(folder), nl=False)
    results.print(f"Ablation: {page}", markup=False, soft_wrap=True)
    fail_if(crashed, page="page")
