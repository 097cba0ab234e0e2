"""`alula pretrain`: an encoder trained by contrast (CLIP) or prediction (AIM), measured, and kept as a part that `compose` takes."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from rich.progress import Progress
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alula.data.enriched import enrich, name_pairs
from alula.data.image_collate import PairCollator, Pixels, PrefixCollator
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.data.tasks import load_task
from alula.errors import UserError
from alula.evaluation.probe import linear_probe, neighbours, retrieve
from alula.files import read_jsonl, sha256, write_json, write_tensors
from alula.methods.aim import Aim
from alula.methods.base import Method
from alula.methods.clip import Clip
from alula.models.composed_processor import ComposedImageProcessor
from alula.models.dual_encoder import DualEncoder
from alula.models.encoders import Encoder, VitEncoder
from alula.models.patch_predictor import PatchPredictor
from alula.models.vision_mixture import statistics_of
from alula.models.vision_parts import build_encoder, build_part, start_afresh
from alula.objectives.clip import START
from alula.running.choices import load_choice
from alula.running.pretrain_recipe import PretrainRecipe
from alula.training import Trainer, TrainSettings

OBJECTIVES = ("clip", "aim")
EMBEDDED = "smol"
PROBES = ("emoji_en", "animals")
BATCH = 64
"""Images a forward when features are taken."""


def pretrain_by(recipe: PretrainRecipe, *, folder: Path, progress: Progress | None = None) -> Path:
    """`pretrain` as a recipe says, on the built-in pairs if it names no task, with the built-in probes.

    Returns:
        the safetensors file.
    """
    choice, size, settings = recipe.task, recipe.probe_size, recipe.train
    if choice and recipe.train_size:
        choice = choice.model_copy(update={"train_size": recipe.train_size})
    pairs = load_choice(choice) if choice else name_pairs(train_size=recipe.train_size or 1500, seed=settings.seed)
    if recipe.objective == "clip" and recipe.captions:
        texts = enrich(pairs.train, share=recipe.captions, seed=settings.seed)
        pairs = replace(pairs, train=texts, description=f"{pairs.description} {recipe.captions:g} of the texts are captions.")
    probes = [] if size == 0 else [load_task(name, train_size=size, test_size=size) for name in PROBES]
    part, head = recipe.encoder, recipe.head
    return pretrain(recipe.objective, pairs, encoder=part, options=head, probes=probes, settings=settings, folder=folder, progress=progress)


def pretrain(
    objective: str,
    pairs: Task,
    *,
    encoder: Mapping[str, object],
    settings: TrainSettings,
    folder: Path,
    probes: Sequence[Task] = (),
    options: Mapping[str, int] | None = None,
    tokenizer: str | PreTrainedTokenizerBase = EMBEDDED,
    progress: Progress | None = None,
) -> Path:
    """Trains an encoder anew and writes ``encoder.safetensors`` and ``encoder.json`` into `folder`.

    ``{**encoder, "weights": "<folder>/encoder.safetensors"}`` is the part to give to `compose`.

    Args:
        objective: `clip` or `aim`.
        pairs: images, each with its text as the answer; `aim` looks at the images alone. The test split is for retrieval.
        encoder: a registered name and its keywords; `aim` wants a `vit`.
        probes: classified images, the class as the answer; a linear probe reads the encoder before and after training.
        options: keywords of `DualEncoder` or `PatchPredictor`.
        tokenizer: of `clip`; a folder or hub name, `smol` for the embedded one.

    Returns:
        the safetensors file.

    Raises:
        UserError: an unknown objective or part, an encoder that `aim` cannot mask, options that the head cannot be built with, or
            settings that contrast cannot have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        trained = build_encoder(dict(encoder))
        start_afresh(trained)
        pixels = pixels_of(trained, encoder)
        model, method, collate = _learner(objective, trained, pixels, settings=settings, options=options or {}, tokenizer=tokenizer)
    before = _probed(trained, pixels, probes)
    identity = f"{objective} {dict(encoder)} {dict(options or {})} {pairs.description}"
    trainer = Trainer(model, method, collate, settings=settings, folder=folder, progress=progress, identity=identity)
    (learnt,) = trainer.learn(Stream(tasks=(pairs,)))
    path = folder / "encoder.safetensors"
    if not trainer.accelerator.is_main_process:
        return path
    losses = [row["loss"] for row in read_jsonl(folder / "losses.jsonl")]
    after = _probed(trained, pixels, probes)
    write_tensors(path, trained.state_dict())
    write_json(
        path.with_suffix(".json"),
        {
            "objective": objective,
            "encoder": {**encoder, "weights": path.name},
            "options": dict(options or {}),
            "task": pairs.name,
            "train_samples": len(pairs.train),
            "settings": settings.model_dump(),
            "seconds": round(learnt.cost.seconds, 3),
            "first_losses": losses[:3],
            "last_loss": losses[-1],
            "probes": {name: {"before": before[name], "after": after[name]} for name in after},
            "retrieval": _retrieved(model, collate, pairs.test),
            "versions": {name: importlib.metadata.version(name) for name in ("alula", "torch", "transformers")},
            "sha256": sha256(path),
        },
    )
    return path


def pixels_of(encoder: Encoder, part: Mapping[str, object]) -> Pixels:
    """What turns pictures into the pixels that `compose` will show this encoder too."""
    side = {"height": encoder.image_size, "width": encoder.image_size}
    processor = ComposedImageProcessor(size=side, **statistics_of(part))  # type: ignore[arg-type]

    def pixels(images: list[Image.Image]) -> Float[Tensor, "images 3 height width"]:
        return processor(images, return_tensors="pt")["pixel_values"]

    return pixels


def _learner(
    objective: str,
    encoder: Encoder,
    pixels: Pixels,
    *,
    settings: TrainSettings,
    options: Mapping[str, int],
    tokenizer: str | PreTrainedTokenizerBase,
) -> tuple[nn.Module, Method, Callable[[Sequence[Sample]], dict[str, Tensor]]]:
    """The model around an encoder, the method that trains it, and what makes its batches."""
    if objective not in OBJECTIVES:
        raise UserError(f"Unknown objective '{objective}'. Known: {', '.join(OBJECTIVES)}. Choose one of them.")
    if objective == "clip":
        words = _tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        dual = build_part(DualEncoder, options, kind="The head of clip", encoder=encoder, vocab_size=len(words), log_scale=START)
        return dual, Clip(dual, settings=settings), PairCollator(pixels, words)
    if not isinstance(encoder, VitEncoder):
        raise UserError(
            f"aim got a {type(encoder).__name__}, which cannot be told which patches it may read. A 'vit' can. Take that one, or clip."
        )
    predictor = build_part(PatchPredictor, options, kind="The head of aim", encoder=encoder)
    return predictor, Aim(predictor, settings=settings), PrefixCollator(pixels, num_patches=encoder.num_tokens, seed=settings.seed)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name != EMBEDDED:
        return AutoTokenizer.from_pretrained(name)
    from alula.models.smol import prepare_smol

    return AutoTokenizer.from_pretrained(prepare_smol())


@torch.no_grad()
def _embedded(
    samples: Sequence[Sample], pixels: Pixels, embed: Callable[[Tensor], Tensor], device: torch.device
) -> Float[Tensor, "images dim"]:
    """One row for the first image of each sample, on the CPU."""
    rows = []
    for start in range(0, len(samples), BATCH):
        images = [sample.open_images()[0] for sample in samples[start : start + BATCH]]
        rows.append(embed(pixels(images).to(device)).float().cpu())
    return torch.cat(rows)


def _probed(encoder: Encoder, pixels: Pixels, probes: Sequence[Task]) -> dict[str, dict]:
    """The linear probe of the mean of the encoder's patches, for each task, and which training images are nearest to a test image."""
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    found = {}
    for task in probes:
        rows = [_embedded(samples, pixels, lambda images: encoder(images).mean(1), device) for samples in (task.train, task.test)]
        classes = [[sample.answer for sample in samples] for samples in (task.train, task.test)]
        measured = (rows[0], classes[0], rows[1], classes[1])
        found[task.name] = {**asdict(linear_probe(*measured)), "neighbours": asdict(neighbours(*measured))}
    encoder.train(was_training)
    return found


@torch.no_grad()
def _retrieved(model: nn.Module, collate: object, samples: Sequence[Sample]) -> dict | None:
    """Retrieval among the test pairs by a trained pair of encoders; None where there is no text encoder, or nothing to find."""
    if not isinstance(model, DualEncoder) or not isinstance(collate, PairCollator) or not samples:
        return None
    model.eval()
    device = model.log_scale.device
    own = [sample.answer for sample in samples]
    names = list(dict.fromkeys(own))
    rows = [
        model.embed_texts(**{key: value.to(device) for key, value in collate.texts(names[start : start + BATCH]).items()}).cpu()
        for start in range(0, len(names), BATCH)
    ]
    images = _embedded(samples, collate.pixels, model.embed_images, device)
    return asdict(retrieve(images, torch.cat(rows), names=names, own=own))
