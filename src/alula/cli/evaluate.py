"""`alula eval`: scores of a pool on tasks, with every prediction kept."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    pool: Annotated[Path, typer.Option(help="The pool's folder.")],
    task: Annotated[list[str], typer.Option(help="A built-in task, or name=file.jsonl. May be repeated.")],
    out: Annotated[Path | None, typer.Option(help="Where predictions go. Default: evaluation in the pool.")] = None,
    all_rows: Annotated[bool, typer.Option(help="Score every row of a file, not only the tenth that `learn` holds out.")] = False,
    limit: Annotated[int | None, typer.Option(help="Test samples at most per task.", min=1)] = None,
    model: Annotated[str | None, typer.Option(help="Where the base model is, if not where the pool says.")] = None,
) -> None:
    """Score a pool on tasks, as it would answer a user: no task is told."""
    from rich.table import Table

    from alula.cli.arguments import task_choice
    from alula.cli.screen import progress, results

    choices = [task_choice(entry) for entry in task]
    from alula.running.learn import open_pool, score_pool
    from alula.running.run import load_choice, load_to_score

    tasks = [(load_to_score if all_rows else load_choice)(choice) for choice in choices]
    folder = out or pool / "evaluation"
    with progress() as bar:
        rows = score_pool(open_pool(pool, model_name=model), tasks, out=folder, limit=limit, progress=bar)
    table = Table("task", "score", "n", "unparsed", "metric")
    for row in rows:
        table.add_row(row["task"], f"{row['score']:.3f}", str(row["num_samples"]), str(row["unparsed"]), row["metric"])
    results.print(table)
    results.print(f"Predictions: {folder}", markup=False, soft_wrap=True)
