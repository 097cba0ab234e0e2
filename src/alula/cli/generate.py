"""`alula generate`: one question to a pool, or to a model as it is, and who answered."""

from pathlib import Path
from typing import Annotated

import typer


def generate(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    pool: Annotated[
        Path | None, typer.Option(help="The pool's folder, or its name on the hub. Without it, --model answers as it is.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image file. May be repeated.", exists=True, dir_okay=False)] = None,
    model: Annotated[str | None, typer.Option(help="A model to ask without a pool; with one: where its base model is.")] = None,
    show_routing: Annotated[bool, typer.Option(help="Show which expert speaks on each token.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.", min=1)] = 64,
) -> None:
    """Ask one question about any number of images."""
    from alula.cli.screen import notes, quiet_libraries, results
    from alula.errors import UserError

    if pool is None and model is None:
        raise UserError("Nobody to ask: give a pool (--pool), or a model as it is (--model).")
    from alula.running.learn import generate as answer
    from alula.running.learn import open_model, open_pool

    quiet_libraries()
    with notes.status("Loading the model ..."):
        opened = open_pool(pool, model_name=model) if pool else open_model(str(model))
    reply = answer(opened, question, images=tuple(image or ()), max_new_tokens=max_new_tokens)
    results.print(reply.text, markup=False, soft_wrap=True)
    if show_routing:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in sorted(reply.shares.items(), key=lambda pair: -pair[1]))
        notes.print(f"Weights: {shares}")
        colours = ("cyan", "green", "yellow", "magenta", "blue", "red")
        names = [name for name in reply.shares if name != "base"]
        for text, speaker in reply.tokens:
            style = colours[names.index(speaker) % len(colours)] if speaker in names else "dim"
            notes.print(text, style=style, end="", markup=False)
        notes.print()
        notes.print("  ".join(f"[{colours[i % len(colours)]}]{name}[/]" for i, name in enumerate(names)) + "  [dim]base model[/]")
