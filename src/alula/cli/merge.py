"""`alula merge`: experts of a pool in the base model's own weights, as a plain model."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    pool: Annotated[Path, typer.Argument(help="The pool's folder, or its name on the hub.")],
    expert: Annotated[list[str], typer.Option(help="NAME, or NAME=0.5 with a weight. May be repeated.")],
    out: Annotated[Path, typer.Option(help="A new folder for model and processor.")],
    model: Annotated[str | None, typer.Option(help="Where the base model is, if not where the pool says.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Merge experts into the base model and save it: Transformers loads it without alula. What was routed speaks everywhere now."""
    from alula.cli.screen import notes, quiet_libraries, results
    from alula.running.merging import merge_pool

    weights = dict(_weight(entry) for entry in expert)
    quiet_libraries()
    with notes.status("Merging ..."):
        kind = merge_pool(pool, weights, out, model_name=model, dtype=dtype)
    results.print(f"Model: {out}", markup=False, soft_wrap=True)
    if kind.__module__.startswith("alula."):
        told = f"Its class, {kind.__name__}, is alula's: who loads the folder runs `import alula.models` first."
        notes.print(told, style="yellow", markup=False, soft_wrap=True)


def _weight(entry: str) -> tuple[str, float]:
    from math import isfinite

    from alula.errors import UserError

    name, equals, number = entry.partition("=")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:
        weight = float("nan")
    if not isfinite(weight):
        raise UserError(f"--expert {entry} came; NAME or NAME=NUMBER is wanted, such as {name}=0.5.")
    return name, weight
