"""`alula diagnose`: where a model's attention goes around an image, before and after tuning."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from alula.data.sample import Sample


def diagnose(
    model: Annotated[str, typer.Argument(help="The model: smol, a folder, or a name on the hub.")],
    data: Annotated[str, typer.Option(help="A data file whose questions have images, or the name of a built-in task.")],
    out: Annotated[Path, typer.Option(help="Where attention_shift.json and attention_shift.html go.")],
    tuned: Annotated[str | None, typer.Option(help="The model after tuning: a pool made for MODEL, or another model.")] = None,
    limit: Annotated[int, typer.Option(help="Samples at most.", min=1)] = 100,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward.", min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Measure the attention shift: whether text after an image is still attended like text before it.

    0: the shares of attention go up and down together over the layers; 2: the opposite. Tuning on images that raises it
    went with a larger loss of text skill in the paper (Wings, arXiv 2406.03496).
    """
    from rich.table import Table

    from alula.cli.arguments import name_for, names_data, task_choice
    from alula.cli.screen import progress, results
    from alula.files import write_json
    from alula.report.attention_shift import FILE, build_attention_page, shift_lines

    choice = task_choice(f"{name_for(data)}={data}") if names_data(data) else task_choice(data, test_size=limit)
    from alula.running.choices import load_to_score

    samples = list(load_to_score(choice).test)[:limit]
    with progress() as bar:
        rows = [_measured(model, None, samples, batch_size, dtype, bar)]
        if tuned is not None:
            rows.append(_measured(model, tuned, samples, batch_size, dtype, bar, prompts=rows[0]["prompt_hash"]))
    write_json(out / FILE, rows)
    page = build_attention_page(rows, out=out / "attention_shift.html", title=f"{model} on {choice.name}")
    table = Table("", "attention shift", "n", "left out", "change")
    for line in shift_lines(rows):
        shift, change = f"{line['shift']}\n{line['interval']}", f"{line['change']}\n{line['change_interval']}"
        table.add_row(*(text.strip().replace("[", "\\[") for text in (line["moment"], shift, line["n"], line["left_out"], change)))
    results.print(table)
    results.print(f"Curves: {page}", markup=False, soft_wrap=True)


def _measured(
    model: str, tuned: str | None, samples: "list[Sample]", batch_size: int, dtype: str, bar: "Progress", *, prompts: str = ""
) -> dict[str, Any]:
    """One entry of the file; the model is gone when it is written, so that there is never more than one.

    Raises:
        UserError: its chat template writes other `prompts` (their hash) than that of the model that was measured first.
    """
    from alula.data.collate import Collator
    from alula.errors import UserError
    from alula.evaluation.attention_shift import diagnose as run
    from alula.evaluation.generation import Around, untouched
    from alula.evaluation.prompts import prompt_hashes
    from alula.evaluation.scores import hash_of_all
    from alula.models import load_model
    from alula.pool import MANIFEST
    from alula.running.learn import open_pool

    around: Around = untouched
    if tuned is not None and (Path(tuned) / MANIFEST).exists():
        opened = open_pool(tuned, model_name=model, dtype=dtype)
        loaded, processor = opened.model, opened.processor
        around = opened.mixtures.director.on_prompts if opened.mixtures else untouched
    else:
        loaded, processor = load_model(tuned or model, dtype=dtype)
    read = hash_of_all(prompt_hashes(processor, samples, with_answers=True))
    if prompts and read != prompts:
        raise UserError(
            f"{tuned} writes the samples in another way than {model} (hashes {read[:12]} and {prompts[:12]}): their chat templates differ, "
            "and a change of attention would be the template's, too. Give both the same processor, or diagnose each by itself."
        )
    name = "base model" if tuned is None else f"tuned: {Path(tuned).name}"
    line = bar.add_task(f"measuring {name}", total=len(samples))
    found = run(
        loaded,
        Collator(processor),
        samples,
        batch_size=batch_size,
        around=around,
        progress=lambda done, total: bar.update(line, completed=done, total=total),
    )
    return {**found.row(row=0 if tuned is None else 1, arm="default", name=name), "prompt_hash": read}
