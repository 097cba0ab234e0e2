"""`alula remap`: a pool for a base model whose modules another version of Transformers renamed."""

from pathlib import Path
from typing import Annotated

import typer


def remap(
    pool: Annotated[Path, typer.Argument(help="The pool's folder.")],
    rule: Annotated[list[str], typer.Argument(help="OLD=NEW: parts of a module's name, model.layers=model.language_model.layers.")],
    model: Annotated[str | None, typer.Option(help="Where the base model is, if not where the pool says.")] = None,
) -> None:
    """Tell a pool that the base model's modules have new names. No weight changes; the base model must be the same."""
    from alula.cli.screen import notes, quiet_libraries, results
    from alula.errors import UserError
    from alula.models import load_model
    from alula.pool import Pool

    pairs = [entry.partition("=") for entry in rule]
    for (old, equals, new), entry in zip(pairs, rule, strict=True):
        if not (old and equals and new):
            raise UserError(f"'{entry}' came; OLD=NEW is wanted, such as model.layers=model.language_model.layers.")
    opened = Pool.open(pool)
    quiet_libraries()
    with notes.status("Loading the model ..."):
        base, _ = load_model(model or opened.base)
    opened.remap(base, {old: new for old, _, new in pairs})
    results.print(f"{pool} fits this model now: {', '.join(opened.names)}", markup=False, soft_wrap=True)
