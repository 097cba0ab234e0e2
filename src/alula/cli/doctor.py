"""`alula doctor data`: what is wrong with a data set, by file and line, before anything is trained."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from alula.data.doctor import Examination
    from alula.data.forecast import DecoderShape

SHOWN = 10
"""Findings of one kind that are printed; --json has all of them."""


class What(StrEnum):
    """What can be examined."""

    data = "data"


def doctor(
    what: Annotated[What, typer.Argument(help="What to examine: data.")],
    files: Annotated[list[Path], typer.Argument(help="Training data: files, shards/*.tar, or folders with train and test.")],
    model: Annotated[str, typer.Option(help="The model whose processor reads them: smol, a folder, or a name on the hub.")] = "smol",
    test: Annotated[Path | None, typer.Option(help="Test data; compared with the training data.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens; the longest row allowed. Default: what the model reads.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward, for the forecast of memory.", min=1)] = 16,
    image_root: Annotated[Path | None, typer.Option(help="Folder that relative image paths start at.")] = None,
    format: Annotated[str | None, typer.Option(help="json, parquet or webdataset, where a file's ending does not tell.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Read a data set with a model's processor and tell what is wrong, by file and line.

    Exit code 1: something would stop a training. Warnings alone: 0.
    """
    from alula.cli.screen import notes, quiet_libraries, results
    from alula.data.doctor import examine
    from alula.models import load_processor

    quiet_libraries()
    name, shape = read_shape(model)
    with notes.status("Reading") as status:
        found = examine(
            files, load_processor(name), test=test, max_length=max_length, batch_size=batch_size, shape=shape, image_root=image_root,
            format=format, progress=lambda origin: status.update(f"Reading {origin}"),
        )  # fmt: skip
    if json_:
        import json

        typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        for part in report(found):
            results.print(part, markup=False, soft_wrap=isinstance(part, str))
    raise typer.Exit(0 if found.is_sound else 1)


def read_shape(model: str) -> "tuple[str, DecoderShape | None]":
    """Where the model is, and the shape of its decoder; None where there is a processor without a model's configuration."""
    from transformers import AutoConfig

    from alula.data.forecast import DecoderShape
    from alula.models.loading import EMBEDDED

    name = model
    if model == EMBEDDED:
        from alula.models.smol import prepare_smol

        name = str(prepare_smol())
    try:
        decoder = AutoConfig.from_pretrained(name).get_text_config(decoder=True)
    except (OSError, ValueError):
        return name, None
    return name, DecoderShape(
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_hidden_layers,
        vocab_size=decoder.vocab_size,
        value_bytes=2 if str(decoder.dtype).endswith("16") else 4,
        max_tokens=getattr(decoder, "max_position_embeddings", None),
    )


def report(found: "Examination") -> list[Any]:
    """Tables and sentences, in the order in which they are printed."""
    from rich.table import Table

    from alula.errors import counted
    from alula.report.format import show_bytes

    files = Table("file", "split", "rows", "usable", title="Data")
    for file in found.files:
        files.add_row(file.name, file.split, str(file.num_rows), str(len(file.rows)))
    lengths = Table("tokens", "median", "90 %", "99 %", "longest", title="Lengths")
    for name, label in (("text", "text"), ("visual", "images"), ("tokens", "whole row")):
        lengths.add_row(label, *(str(value) for value in found.lengths[name].values()))
    parts: list[Any] = [files, lengths]
    if found.longest:
        rows = "; ".join(f"{row.origin} {row.tokens} ({row.visual} of images)" for row in found.longest)
        parts.append(f"Longest rows: {rows}.")
    if found.batch_bytes is not None and found.usual_batch_bytes is not None:
        longest, usual = (f"about {show_bytes(size)}" for size in (found.batch_bytes, found.usual_batch_bytes))
        rows = counted(found.batch_size, "row")
        forecast = f"Forecast: {rows} of the longest length keep {longest} of activations and logits, of the 90 % length {usual}."
        top = "Weights, gradients and the optimizer come on top (docs/data.md)."
        parts.append(f"{forecast} {top} Too much? Drop or shorten the longest rows, or train with --set micro_batch_size=1.")
    for (level, kind), count in found.counts.items():
        told = [finding.message for finding in found.findings if (finding.level, finding.kind) == (level, kind)]
        more = f"\n  ... and {count - SHOWN} more (--json has all)" if count > SHOWN else ""
        parts.append(f"{level}: {kind} ({count})\n" + "\n".join(f"  {message}" for message in told[:SHOWN]) + more)
    if not found.findings:
        parts.append("Nothing is wrong.")
    return parts
