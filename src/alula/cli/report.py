"""`alula report`: one HTML file from a run folder or a pool."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path | None, typer.Option(help="Where the page goes. Default: report.html in the folder.")] = None,
) -> None:
    """Build the report from the folder alone."""
    from alula.cli.screen import results
    from alula.cli.tables import summary_table
    from alula.report import build_report

    page = build_report(folder, out=out)
    results.print(summary_table(folder))
    results.print(f"Report: {page}")
