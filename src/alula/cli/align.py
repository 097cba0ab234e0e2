"""`alula align`: a composed model's connector, trained once."""

from pathlib import Path
from typing import Annotated

import typer


def align(
    out: Annotated[Path, typer.Option(help="Where connector.safetensors and its manifest go.")],
    model: Annotated[str, typer.Option(help="A model with an encoder and a connector.")] = "smol",
    task: Annotated[str, typer.Option(help="A built-in task, or name=file.jsonl.")] = "captions",
    train_size: Annotated[int | None, typer.Option(help="Training samples at most.", min=1)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A training setting: steps=400. May be repeated.")] = None,
) -> None:
    """Train a connector so that a frozen language model can read a frozen image encoder."""
    from alula.cli.arguments import task_choice
    from alula.cli.screen import progress, results
    from alula.config import check_train, parse_settings

    defaults = {"steps": 400, "batch_size": 16, "learning_rate": 1e-3, "warmup_ratio": 0.05, "save_every": 100}
    settings = check_train(parse_settings(set_ or []), defaults=defaults)
    choice = task_choice(task, train_size=train_size)
    from alula.aligning import align as run
    from alula.running.choices import load_choice

    with progress() as bar:
        made = run(model, load_choice(choice), settings=settings, folder=out, progress=bar)
    results.print(f"Connector: {made}", markup=False, soft_wrap=True)
