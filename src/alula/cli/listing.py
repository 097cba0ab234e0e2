"""`alula list`: what there is to name in a recipe, or what is in a pool."""

from pathlib import Path
from typing import Annotated

import typer


def first_sentence(kind: type) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def listing(pool: Annotated[Path | None, typer.Argument(help="A pool folder; without it, all that alula knows by name.")] = None) -> None:
    """List a pool's experts, or every task, method, addition and router by name."""
    from alula.cli.screen import results

    if pool is not None:
        from alula.cli.tables import pool_table

        results.print(pool_table(pool))
        return
    from rich.table import Table

    from alula.data.tasks import describe
    from alula.methods import ADDITIONS, METHODS
    from alula.routers.named import ROUTINGS

    tasks = Table("task", "languages", "blind", "what", title="Built-in tasks")
    for name, info in describe().items():
        tasks.add_row(name, " ".join(info.languages), "-" if info.blind is None else f"{info.blind:.2f}", info.summary)
    results.print(tasks)
    methods = Table("method", "what", title="Methods")
    for name in METHODS:
        methods.add_row(name, first_sentence(METHODS[name]))
    results.print(methods)
    additions = Table("addition", "what", title="Additions to a method (`with`)")
    for name in ADDITIONS:
        additions.add_row(name, first_sentence(ADDITIONS[name]))
    results.print(additions)
    results.print(f"Arms of `routed`: {', '.join(ROUTINGS)}, oracle, uniform")
