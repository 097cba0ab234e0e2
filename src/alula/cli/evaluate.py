"""`alula eval`: scores of a pool, or of a model, on tasks, with every prediction kept."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    task: Annotated[list[str], typer.Option(help="A built-in task, or name=file.jsonl. May be repeated.")],
    pool: Annotated[Path | None, typer.Option(help="The pool's folder. Without one, the model as it is is scored.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where predictions go. Default: evaluation in the pool.")] = None,
    all_rows: Annotated[bool, typer.Option(help="Score every row of a file, not only the tenth that `learn` holds out.")] = False,
    limit: Annotated[int | None, typer.Option(help="Test samples at most per task.", min=1)] = None,
    model: Annotated[str | None, typer.Option(help="A model to score without a pool; with one: where its base model is.")] = None,
) -> None:
    """Score a pool on tasks, as it would answer a user: no task is told."""
    from rich.table import Table

    from alula.cli.arguments import task_choice
    from alula.cli.screen import progress, results
    from alula.errors import UserError

    folder = out or (pool / "evaluation" if pool else None)
    if folder is None or (pool is None and model is None):
        raise UserError("Nothing to score: give a pool (--pool), or a model (--model) and a folder for its predictions (--out).")
    choices = [task_choice(entry) for entry in task]
    from alula.running.learn import open_model, open_pool, score_pool
    from alula.running.run import load_choice, load_to_score

    tasks = [(load_to_score if all_rows else load_choice)(choice) for choice in choices]
    with progress() as bar:
        opened = open_pool(pool, model_name=model) if pool else open_model(str(model))
        rows = score_pool(opened, tasks, out=folder, limit=limit, progress=bar)
    table = Table("task", "score", "n", "unparsed", "metric")
    for row in rows:
        table.add_row(row["task"], f"{row['score']:.3f}", str(row["num_samples"]), str(row["unparsed"]), row["metric"])
    results.print(table)
    results.print(f"Predictions: {folder}", markup=False, soft_wrap=True)
