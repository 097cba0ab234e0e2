"""`alula report`: one HTML file from a run folder or a pool."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="A run folder or a pool.")],
    out: Annotated[Path | None, typer.Option(help="Where the page goes. Default: report.html in the folder.")] = None,
) -> None:
    """Build one HTML page that shows what was learnt and what was lost, from a run folder or a pool."""
    from alula.cli.screen import results

    if (folder / "pool.json").exists():
        from alula.cli.tables import pool_table
        from alula.report.pool_page import build_pool_report

        page = build_pool_report(folder, out=out)
        results.print(pool_table(folder))
    else:
        from alula.cli.tables import summary_table
        from alula.report import build_report

        page = build_report(folder, out=out)
        results.print(summary_table(folder))
    results.print(f"Report: {page}", markup=False, soft_wrap=True)
