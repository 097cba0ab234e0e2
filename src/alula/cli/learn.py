"""`alula learn`: one more task for a pool, without any old data."""

from pathlib import Path
from typing import Annotated, Any

import typer

FEW = 20
"""Test samples below which a score says little."""


def learn(
    context: typer.Context,
    task: Annotated[str, typer.Option(help="name=file.jsonl (or .json, .parquet, a folder), or the name of a built-in task.")],
    pool: Annotated[Path, typer.Option(help="The pool's folder; it is made if there is none.")],
    model: Annotated[
        str | None, typer.Option(help="The base model: smol, a folder, or a name on the hub. Default: the pool's; smol for a new pool.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="A file of test rows. Default: a tenth of the data is held out.")] = None,
    scoring: Annotated[str, typer.Option(help="exact_match, ranked for rows with options, or box_iou for boxes.")] = "exact_match",
    train_size: Annotated[int | None, typer.Option(help="Training samples at most.", min=1)] = None,
    test_size: Annotated[int | None, typer.Option(help="Test samples at most.", min=1)] = None,
    rank: Annotated[int, typer.Option(help="Width of the expert.", min=1)] = 8,
    linears: Annotated[
        str | None, typer.Option(help="Where a new pool's experts sit: names with commas. Default: all of the decoder.")
    ] = None,
    router: Annotated[
        str | None, typer.Option(help="Who chooses among a new pool's experts (`alula list`). Default: analytic_reject.")
    ] = None,
    method: Annotated[str, typer.Option(help="routed: one expert per task; wings: learners beside attention.")] = "routed",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or 4bit.")] = "auto",
    set_: Annotated[list[str] | None, typer.Option("--set", help="A training setting: steps=200. May be repeated.")] = None,
) -> None:
    """Learn one task. Nothing that the pool holds is changed; no data of earlier tasks is needed.

    A row of the file, with images beside it:
    {"question": "What is this?", "answer": "a heron", "image": "heron.png"}
    """
    from alula.cli.arguments import refuse_given, task_choice
    from alula.cli.launched import is_main, launched
    from alula.cli.screen import progress, silent
    from alula.config import check_train, parse_settings
    from alula.errors import UserError

    if method == "wings":
        refuse_given(context, "linears", "router", because="--method wings")
    choice = task_choice(task, test_path=test, scoring=scoring, train_size=train_size, test_size=test_size)
    with launched() as asked, silent(not is_main()), progress() as bar:
        settings = check_train(parse_settings([*(set_ or []), *asked]), defaults={"save_every": 20})
        from alula.running.choices import load_choice
        from alula.running.learn import learn_task

        if method == "wings":
            from alula.running.learn_wings import learn_wings

            about = learn_wings(model, pool, load_choice(choice), settings=settings, options={"rank": rank}, dtype=dtype, progress=bar)
        elif method == "routed":
            places = linears.split(",") if linears else None
            about = learn_task(
                model, pool, load_choice(choice), settings=settings, rank=rank, linears=places, router=router, dtype=dtype, progress=bar
            )
        else:
            raise UserError(f"Method '{method}' came; a pool is taught by routed or wings. For other methods write a recipe: `alula run`.")
    if is_main():
        _tell(choice.name, about, pool)


def _tell(name: str, about: dict[str, Any], pool: Path) -> None:
    """The scores, and what to do next."""
    from alula.cli.arguments import quoted
    from alula.cli.screen import notes, results

    if about["after"] is not None:
        scores = f"{about['before']:.3f} before, {about['after']:.3f} after"
        results.print(f"{name}: {scores} ({about['metric'].replace('_', ' ')}, n = {about['test_samples']})", soft_wrap=True)
        if about["test_samples"] < FEW:
            notes.print(f"n = {about['test_samples']} says little; --test takes a file with more test rows.", soft_wrap=True)
    asking = f"alula generate --pool {quoted(pool)} --image picture.png 'What is this?'"
    notes.print(f"Kept in {pool}. Ask it: {asking}\nAll it has learnt: alula report {quoted(pool)}", markup=False, soft_wrap=True)
