"""`alula push` and `alula card`: a pool on the Hugging Face hub, and the page it shows there."""

from pathlib import Path
from typing import Annotated

import typer


def card(
    pool: Annotated[Path, typer.Argument(help="The pool's folder.")],
    license: Annotated[str | None, typer.Option(help="As the hub names it: apache-2.0. Default: the card's, else unknown.")] = None,
) -> None:
    """Write the pool's README.md: what it can do, what was forgotten, how to use it. What you wrote below its last line stays."""
    from alula.cli.screen import results
    from alula.report.card import write_card

    results.print(f"Card: {write_card(pool, license=license)}", markup=False, soft_wrap=True)


def push(
    pool: Annotated[Path, typer.Argument(help="The pool's folder.")],
    repo: Annotated[str, typer.Argument(help="Where it goes on the hub: owner/name.")],
    public: Annotated[bool, typer.Option(help="Make a new repository public; a pool is as confidential as its data.")] = False,
    predictions: Annotated[bool, typer.Option(help="Also the answers on test rows, with their questions and references.")] = False,
    license: Annotated[str | None, typer.Option(help="As the hub names it: apache-2.0. Default: the card's, else unknown.")] = None,
) -> None:
    """Put a pool on the Hugging Face hub, with its card. `alula generate --pool owner/name ...` then uses it from there."""
    from alula.cli.screen import notes, results
    from alula.pool import Pool
    from alula.report.card import write_card

    opened = Pool.open(pool)
    write_card(pool, repo=repo, license=license)
    results.print(opened.push_to_hub(repo, private=not public, predictions=predictions), markup=False, soft_wrap=True)
    if Path(opened.base).is_absolute():
        told = f"Its base model is {opened.base}, on this machine: others need a copy of it, and --model."
        notes.print(told, style="yellow", markup=False, soft_wrap=True)
