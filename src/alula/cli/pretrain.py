"""`alula pretrain`: an image encoder, trained from scratch by contrast with text or by predicting patches."""

from pathlib import Path
from typing import Annotated, Any

import typer

# Source: MM1's encoders (rate, weight decay, AIM's warm-up). Steps and sizes are ours: about ten minutes of one CPU core.
SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {"weight_decay": 0.2, "warmup_ratio": 0.05},
    "aim": {"weight_decay": 0.05, "warmup_ratio": 0.025, "steps": 600},
}
SHARED: dict[str, Any] = {"steps": 800, "batch_size": 64, "learning_rate": 1e-3, "save_every": 100}
HEADS: dict[str, dict[str, int]] = {"clip": {}, "aim": {"head_dim": 256, "num_blocks": 4}}
PARTS: dict[str, dict[str, int]] = {"vit": {"image_size": 64, "patch_size": 8, "dim": 128, "num_layers": 4, "num_heads": 4}}
PROBES = ("emoji_en", "animals")


def pretrain(
    objective: Annotated[str, typer.Argument(help="clip: contrast with text. aim: predict the next patch.")],
    out: Annotated[Path, typer.Option(help="Where encoder.safetensors and its manifest go.")],
    encoder: Annotated[str, typer.Option(help="A registered encoder; aim wants vit.")] = "vit",
    part: Annotated[list[str] | None, typer.Option("--part", help="A keyword of the encoder: dim=192. May be repeated.")] = None,
    head: Annotated[list[str] | None, typer.Option("--head", help="A keyword of what is trained beside it: head_dim=512.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Images with texts as answers: a built-in task, or name=file.jsonl. Default: all built-in pairs.")
    ] = None,
    captions: Annotated[float, typer.Option(help="Share of training texts that become captions from templates.", min=0, max=1)] = 0.5,
    train_size: Annotated[int | None, typer.Option(help="Training samples at most; of the built-in pairs, of each source.", min=1)] = None,
    probe_size: Annotated[int | None, typer.Option(help="Samples a split for the linear probes; 0 is none.", min=0)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A training setting: steps=400. May be repeated.")] = None,
) -> None:
    """Train an image encoder that `compose` takes, and measure it by linear probes and retrieval."""
    from dataclasses import replace

    from alula.cli.arguments import task_choice
    from alula.cli.launched import is_main, launched
    from alula.cli.screen import progress, results, silent
    from alula.config import check_train, parse_settings

    keywords, heads = PARTS.get(encoder, {}) | parse_settings(part or []), HEADS.get(objective, {}) | parse_settings(head or [])
    choice = task_choice(task, train_size=train_size) if task else None
    with launched() as asked, silent(not is_main()), progress() as bar:
        settings = check_train(parse_settings([*(set_ or []), *asked]), defaults=SHARED | SETTINGS.get(objective, {}))
        from alula.data.enriched import enrich, name_pairs
        from alula.data.tasks import load_task
        from alula.running.choices import load_choice
        from alula.running.pretrain import pretrain as run

        pairs = load_choice(choice) if choice else name_pairs(train_size=train_size or 1500, seed=settings.seed)
        if objective == "clip" and captions:
            texts = enrich(pairs.train, share=captions, seed=settings.seed)
            pairs = replace(pairs, train=texts, description=f"{pairs.description} {captions:g} of the texts are captions.")
        probes = [] if probe_size == 0 else [load_task(name, train_size=probe_size, test_size=probe_size) for name in PROBES]
        part_of = {"name": encoder, **keywords}
        made = run(objective, pairs, encoder=part_of, settings=settings, folder=out, probes=probes, options=heads, progress=bar)
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
    found = about["retrieval"]
    if found:
        for way, queries in (("image_to_text", found["num_images"]), ("text_to_image", found["num_texts"])):
            recalls = ", ".join(f"recall@{best} {value:.3f}" for best, value in found[way].items())
            lines.append(f"Retrieval, {way.replace('_', ' ')}: {recalls} ({queries} queries)")
    return lines
