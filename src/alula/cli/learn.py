"""`alula learn`: one more task for a pool, without any old data."""

from pathlib import Path
from typing import Annotated

import typer


def learn(
    task: Annotated[str, typer.Option(help="name=file.jsonl (or .json, .parquet, a folder), or the name of a built-in task.")],
    pool: Annotated[Path, typer.Option(help="The pool's folder; it is made if there is none.")],
    model: Annotated[str, typer.Option(help="The base model: smol, a folder, or a name on the hub.")] = "smol",
    test: Annotated[Path | None, typer.Option(help="Test rows. Default: a tenth of the data is held out.")] = None,
    scoring: Annotated[str, typer.Option(help="exact_match, or ranked for rows with options.")] = "exact_match",
    train_size: Annotated[int | None, typer.Option(help="Training samples at most.")] = None,
    test_size: Annotated[int | None, typer.Option(help="Test samples at most.")] = None,
    rank: Annotated[int, typer.Option(help="Width of the expert.")] = 8,
    linears: Annotated[str | None, typer.Option(help="Where a new pool's experts sit: names with commas. Default: all of the decoder.")] = None,
    router: Annotated[str, typer.Option(help="How a new pool's experts are chosen; see `alula list`.")] = "analytic",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    set_: Annotated[list[str] | None, typer.Option("--set", help="A training setting: steps=200. May be repeated.")] = None,
) -> None:
    """Learn one task. Nothing that the pool holds is changed; no data of earlier tasks is needed."""
    import yaml

    from alula.cli.screen import notes, progress, results
    from alula.config import TaskChoice, check_train

    settings = check_train({key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in set_ or [])})
    name, _, path = task.partition("=")
    choice = TaskChoice(
        name=name, path=Path(path) if path else None, test_path=test, scoring=scoring, train_size=train_size, test_size=test_size
    )
    from alula.running.learn import learn_task
    from alula.running.run import load_choice

    with progress() as bar:
        about = learn_task(
            model,
            pool,
            load_choice(choice),
            settings=settings,
            rank=rank,
            linears=linears.split(",") if linears else None,
            router=router,
            dtype=dtype,
            progress=bar,
        )
    if about["after"] is not None:
        results.print(f"{name}: {about['before']:.3f} before, {about['after']:.3f} after (n = {about['test_samples']})")
    notes.print(f"Kept in {pool}. Ask it: alula generate --pool {pool} --image picture.png 'What is this?'")
