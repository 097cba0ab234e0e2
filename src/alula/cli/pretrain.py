"""`alula pretrain`: an image encoder, trained from scratch by contrast with text or by predicting patches."""

from pathlib import Path
from typing import Annotated, Any

import typer


def pretrain(
    objective: Annotated[str, typer.Argument(help="clip: contrast with text. aim: predict the next patch. Or a recipe: a .yaml file.")],
    out: Annotated[Path, typer.Option(help="Where encoder.safetensors and its manifest go.")],
    encoder: Annotated[str | None, typer.Option(help="A registered encoder (default: vit); aim wants vit.")] = None,
    part: Annotated[list[str] | None, typer.Option("--part", help="A keyword of the encoder: dim=192. May be repeated.")] = None,
    head: Annotated[list[str] | None, typer.Option("--head", help="A keyword of what is trained beside it: head_dim=512.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Images with texts as answers: a built-in task, or name=file.jsonl. Default: all built-in pairs.")
    ] = None,
    captions: Annotated[
        float | None, typer.Option(help="Share of training texts that become captions from templates (default: 0.5).", min=0, max=1)
    ] = None,
    train_size: Annotated[int | None, typer.Option(help="Training samples at most; of the built-in pairs, of each source.", min=1)] = None,
    probe_size: Annotated[int | None, typer.Option(help="Samples a split for the linear probes; 0 is none.", min=0)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A training setting: steps=400. May be repeated.")] = None,
) -> None:
    """Train an image encoder that `compose` takes, and measure it by linear probes and retrieval."""
    from alula.cli.arguments import task_choice
    from alula.cli.launched import is_main, launched
    from alula.cli.screen import progress, results, silent
    from alula.config import parse_settings
    from alula.running.pretrain_recipe import read_pretraining

    with launched() as asked, silent(not is_main()), progress() as bar:
        typed = {
            "encoder": ({"name": encoder} if encoder else {}) | parse_settings(part or []),
            "head": parse_settings(head or []),
            "task": task_choice(task) if task else None,
            "captions": captions,
            "train_size": train_size,
            "probe_size": probe_size,
            "train": parse_settings([*(set_ or []), *asked]),
        }
        recipe = read_pretraining(objective, {key: value for key, value in typed.items() if value is not None})
        from alula.running.pretrain import pretrain_by

        made = pretrain_by(recipe, folder=out, progress=bar)
    if is_main():
        from alula.files import read_json

        for line in [*_told(read_json(made.with_suffix(".json"))), f"Encoder: {made}"]:
            results.print(line, markup=False, soft_wrap=True)


def _told(about: dict[str, Any]) -> list[str]:
    """The measures of a manifest, each with its number of samples."""
    lines = [
        f"Linear probe, {name}: {both['after']['score']:.3f} (untrained {both['before']['score']:.3f}, commonest class "
        f"{both['after']['chance']:.3f}; {both['after']['num_test']} test images, {both['after']['num_classes']} classes)"
        for name, both in about["probes"].items()
    ]
    for name, both in about["probes"].items():
        near = both["after"]["neighbours"]
        recalls = ", ".join(
            f"recall@{best} {value:.3f} (untrained {both['before']['neighbours']['recall'][best]:.3f})"
            for best, value in near["recall"].items()
        )
        lines.append(f"Retrieval, image to image, {name}: {recalls} ({near['num_queries']} queries among {near['num_searched']} images)")
    found = about["retrieval"]
    if found:
        for way, queries in (("image_to_text", found["num_images"]), ("text_to_image", found["num_texts"])):
            recalls = ", ".join(f"recall@{best} {value:.3f}" for best, value in found[way].items())
            lines.append(f"Retrieval, {way.replace('_', ' ')}: {recalls} ({queries} queries)")
    return lines
