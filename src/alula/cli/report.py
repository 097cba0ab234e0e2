"""`alula report`: one HTML file from a run folder or a pool, or the numbers as Markdown."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="A run folder, finished or not, or a pool.")],
    out: Annotated[Path | None, typer.Option(help="Where the page goes. Default: report.html (compare.html) in the folder.")] = None,
    comparison: Annotated[bool, typer.Option("--comparison", help="Build the page of `alula compare` instead.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the results as Markdown tables instead; no page is built.")] = False,
) -> None:
    """Build one HTML page that shows what was learnt and what was lost, from a run folder or a pool."""
    from alula.cli.screen import results

    if markdown:
        from alula.report.markdown import markdown_tables

        typer.echo(markdown_tables(folder), nl=False)
        return
    if (folder / "pool.json").exists() and not comparison:
        from alula.cli.tables import pool_table
        from alula.report.pool_page import build_pool_report

        page = build_pool_report(folder, out=out)
        results.print(pool_table(folder))
    else:
        from alula.cli.tables import summary_table
        from alula.report import build_report
        from alula.report.comparison import build_comparison

        page = (build_comparison if comparison else build_report)(folder, out=out)
        results.print(summary_table(folder))
    results.print(f"{'Comparison' if comparison else 'Report'}: {page}", markup=False, soft_wrap=True)
