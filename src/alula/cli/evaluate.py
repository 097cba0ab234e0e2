"""`alula eval`: scores of a pool, or of a model, on tasks or in another program's harness, with every prediction kept."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from alula.data.stream import Task
    from alula.running.learn import Opened

HARNESSES = ("lm-eval", "lmms-eval")
SHOTS = ("shots_by", "shots_as", "seed")
"""Options that say which shots, where there are any."""


def evaluate(
    context: typer.Context,
    task: Annotated[list[str] | None, typer.Option(help="A built-in task, or name=file.jsonl. May be repeated.")] = None,
    pool: Annotated[
        Path | None, typer.Option(help="The pool's folder, or its name on the hub. Without it, --model is scored as it is.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where predictions go. Default: evaluation in the pool's folder.")] = None,
    all_rows: Annotated[bool, typer.Option(help="Score every row of a file, not only the tenth that `learn` holds out.")] = False,
    limit: Annotated[int | None, typer.Option(help="Test samples at most per task.", min=1)] = None,
    model: Annotated[str | None, typer.Option(help="A model to score without a pool; with one: where its base model is.")] = None,
    shots: Annotated[int | None, typer.Option(help="Solved examples before each question (docs/few_shot.md).", min=0)] = None,
    shots_by: Annotated[str, typer.Option(help="How they are chosen: seed or similarity (needs the package of minilm).")] = "seed",
    shots_as: Annotated[str, typer.Option(help="chat, or the published prompts vqa and caption.")] = "chat",
    seed: Annotated[int, typer.Option(help="Of the draw of shots.", min=0)] = 0,
    harness: Annotated[str | None, typer.Option(help="lm-eval or lmms-eval: run --tasks in that harness on the live model.")] = None,
    tasks: Annotated[str | None, typer.Option(help="The harness's tasks, with commas between them.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder of task files of your own for the harness.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="lm-eval: examples before each question. Default: the task's own.", min=0)] = None,
    chat_template: Annotated[bool, typer.Option(help="lm-eval: write prompts as the model's conversations.")] = False,
    batch_size: Annotated[int, typer.Option(help="The harness's requests in one forward.", min=1)] = 8,
) -> None:
    """Score a pool, or a model without one, on tasks or in another program's harness, as it would answer a user: no task is told."""
    from alula.cli.arguments import task_choice
    from alula.cli.screen import progress, results
    from alula.errors import UserError

    folder = out or (pool / "evaluation" if pool and not harness else None)
    if pool is None and model is None:
        raise UserError("Nothing to score: give a pool (--pool), or a model (--model) and a folder for its predictions (--out).")
    if folder is None:
        raise UserError("There is no folder for the results. Give one with --out.")
    if bool(task) == bool(tasks) or bool(tasks) != bool(harness):
        raise UserError("Give --task for alula's own tasks and your files, or --harness with --tasks NAME,... for another program's.")
    _refuse_unused(context, harness, shots)
    if harness:
        options = {"include_path": include_path, "num_fewshot": num_fewshot, "chat_template": chat_template, "limit": limit}
        _harness(harness, str(tasks).split(","), pool, model, folder, batch_size=batch_size, options=options)
        return
    choices = [task_choice(entry) for entry in task or ()]
    if out is None:
        _refuse_hub_name(str(pool))
    from alula.running.choices import load_choice, load_to_score
    from alula.running.learn import score_pool

    with progress() as bar:
        loaded = [(load_to_score if all_rows else load_choice)(choice) for choice in choices]
        opened = _opened(pool, model)
        loaded, finish = _with_shots(opened, loaded, shots, by=shots_by, form=shots_as, seed=seed, limit=limit)
        rows = score_pool(opened, loaded, out=folder, limit=limit, progress=bar, finish=finish)
    _table(rows, {"score": "score", "n": "num_samples", "unparsed": "unparsed", "metric": "metric"})
    results.print(f"Predictions: {folder}", markup=False, soft_wrap=True)


def _refuse_unused(context: typer.Context, harness: str | None, shots: int | None) -> None:
    """Options of the other kind of evaluation are refused.

    Raises:
        UserError: one was given.
    """
    from alula.cli.arguments import refuse_given

    if harness is None:
        refuse_given(context, "include_path", "num_fewshot", "chat_template", "batch_size", because="--task")
    else:
        refuse_given(context, "all_rows", "shots", *SHOTS, because="--harness")
    if harness == "lmms-eval":
        refuse_given(context, "num_fewshot", "chat_template", because="--harness lmms-eval")
    if shots is None:
        refuse_given(context, *SHOTS, because="--task without --shots")


def _refuse_hub_name(pool: str) -> None:
    """Predictions go into a pool's folder; one made under a name on the hub would hide the pool from then on.

    Raises:
        UserError: `pool` is no folder here, but may be a name on the hub.
    """
    from alula.errors import UserError
    from alula.pool.hub import is_hub_name

    if is_hub_name(pool):
        raise UserError(f"{pool} is no folder here, so predictions cannot go into it. Give a folder with --out, or correct the path.")


def _opened(pool: Path | None, model: str | None) -> "Opened":
    from alula.running.learn import open_model, open_pool

    return open_pool(pool, model_name=model) if pool else open_model(str(model))


def _with_shots(
    opened: "Opened", tasks: list["Task"], shots: int | None, *, by: str, form: str, seed: int, limit: int | None
) -> tuple[list["Task"], Any]:
    """The tasks with shots before their questions, and what scores the answers anew; without shots the tasks and None."""
    from alula.cli.screen import notes
    from alula.data.collate import Collator
    from alula.data.interleaved.embedding import load_embedder
    from alula.evaluation.few_shot import Budget, context_of, few_shot, rescore

    if shots is None:
        return tasks, None
    collator = Collator(opened.processor)
    context = context_of(opened.model, collator)
    budget = Budget(collator, context=context) if context else None
    embed = load_embedder("minilm") if by == "similarity" else None
    found = {}
    for task in tasks:
        found[task.name] = few_shot(task, shots=shots, by=by, seed=seed, form=form, embed=embed, budget=budget, limit=limit)
        notes.print(found[task.name].describe(), markup=False, soft_wrap=True)
    return [each.task for each in found.values()], lambda task, predictions: rescore(found[task.name], predictions)


def _harness(
    name: str, tasks: list[str], pool: Path | None, model: str | None, out: Path, *, batch_size: int, options: dict[str, Any]
) -> None:
    """Runs a harness on the live model; shows and keeps what it found."""
    import importlib
    import logging

    from alula.cli.screen import notes, quiet_libraries, results
    from alula.errors import UserError, install_extra, nearest

    if name not in HARNESSES:
        raise UserError(f"Unknown harness '{name}'. {nearest(name, HARNESSES)}")
    try:
        module = importlib.import_module(f"alula.evaluation.harnesses.{name.replace('-', '_')}")
    except ImportError as error:
        wanted = install_extra("eval") if name == "lm-eval" else "Type: pip install lmms-eval torchvision"
        raise UserError(f"--harness {name} came, but it is not installed ({error}). {wanted}") from error
    from alula.evaluation.generation import untouched
    from alula.evaluation.harnesses.results import summary, write_results

    quiet_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is an object
    with notes.status("Loading the model ..."):
        opened = _opened(pool, model)
    around = opened.mixtures.director.on_prompts if opened.mixtures else untouched
    live = module.LiveModel(opened.model, opened.processor, around=around, batch_size=batch_size)
    found = module.run_tasks(live, tasks, **options)
    routing = opened.pool.arm if opened.pool and opened.mixtures and opened.mixtures.names else None
    about = {"model": opened.pool.base if opened.pool else str(model), "pool": str(pool) if pool else None, "routing": routing}
    write_results(found, out, harness=name, about=about | options)
    _table(summary(found), {"metric": "metric", "value": "value", "stderr": "stderr", "n": "num_samples"})
    results.print(f"Results and samples: {out}", markup=False, soft_wrap=True)


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """One row for each task; `columns` maps headings to keys."""
    from rich.markup import escape
    from rich.table import Table

    from alula.cli.screen import results

    table = Table("task", *columns)
    for row in rows:
        cells = [row[key] for key in columns.values()]
        shown = ["-" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
        table.add_row(escape(row["task"]), *map(escape, shown))
    results.print(table)
