"""`alula adopt`: a PEFT adapter that was trained elsewhere joins a pool."""

from pathlib import Path
from typing import Annotated

import typer


def adopt(
    pool: Annotated[Path, typer.Argument(help="The pool's folder; it is made if there is none.")],
    adapter: Annotated[Path, typer.Option(help="The folder of a PEFT LoRA adapter.", exists=True, file_okay=False)],
    name: Annotated[str, typer.Option(help="What the expert is called.")],
    data: Annotated[Path | None, typer.Option(help="Rows of what the adapter is for: most routers need some, scores do.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model, for a new pool, or where it is if not where the pool says.")] = None,
    scoring: Annotated[str, typer.Option(help="exact_match, ranked for rows with options, or box_iou for boxes.")] = "exact_match",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Take in a LoRA adapter that PEFT, TRL or another tool trained. Its weights stay as they are; nothing is trained."""
    from alula.cli.arguments import task_choice
    from alula.cli.screen import notes, quiet_libraries, results
    from alula.running.adopting import adopt as take_in
    from alula.running.choices import load_choice

    task = load_choice(task_choice(f"{name}={data}", scoring=scoring)) if data else None
    quiet_libraries()
    with notes.status("Adopting ..."):
        about = take_in(pool, adapter, name, task=task, model_name=model, dtype=dtype)
    if about["after"] is not None:
        scores = f"{about['before']:.3f} before, {about['after']:.3f} after"
        results.print(f"{name}: {scores} ({about['metric'].replace('_', ' ')}, n = {about['test_samples']})", soft_wrap=True)
    notes.print(f"Kept in {pool}.", markup=False, soft_wrap=True)
