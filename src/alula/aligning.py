"""`alula align`: trains a composed model's connector once, and keeps it with the manifest of the run that made it."""

import importlib.metadata
import time
from pathlib import Path

import torch
from rich.progress import Progress

from alula.data.collate import Collator
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.evaluation.evaluate import evaluate_task
from alula.files import read_jsonl, sha256, write_json, write_tensors
from alula.methods.align import Align
from alula.models import anatomy, load_model
from alula.models.vision_parts import start_afresh
from alula.training import Trainer, TrainSettings


def align(
    model_name: str,
    task: Task,
    *,
    settings: TrainSettings,
    folder: Path,
    test_size: int = 64,
    progress: Progress | None = None,
) -> Path:
    """Trains the connector anew on `task` and writes ``connector.safetensors`` (fp16) and ``connector.json`` into `folder`.

    Returns:
        the safetensors file.

    Raises:
        UserError: the model has no connector.
    """
    model, processor = load_model(model_name)
    parts = anatomy(model)
    if not parts.connector:
        raise UserError(f"'{model_name}' has no connector to align. Name a model with an encoder, or `smol`.")
    (root,) = parts.connector
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for module in model.get_submodule(root).modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        start_afresh(model.get_submodule(root))  # a part that starts in a way of its own has the last word
    collator = Collator(processor)
    trainer = Trainer(model, Align(model, settings=settings), collator, settings=settings, folder=folder, progress=progress)
    started = time.perf_counter()
    for _ in trainer.learn(Stream(tasks=(task,))):
        pass
    seconds = time.perf_counter() - started
    predictions = evaluate_task(model, collator, task, batch_size=32, limit=test_size)
    losses = [row["loss"] for row in read_jsonl(folder / "losses.jsonl")]
    path = folder / "connector.safetensors"
    tensors = model.get_submodule(root).state_dict()
    write_tensors(path, {name: tensor.to(torch.float16) for name, tensor in tensors.items()})
    write_json(
        path.with_suffix(".json"),
        {
            "model": model_name,
            "task": task.name,
            "description": task.description,
            "train_samples": len(task.train),
            "settings": settings.model_dump(),
            "seconds": round(seconds, 1),
            "first_losses": losses[:3],
            "last_loss": losses[-1],
            "exact_match": sum(found.score for found in predictions) / len(predictions),
            "test_samples": len(predictions),
            "versions": {name: importlib.metadata.version(name) for name in ("alula", "torch", "transformers")},
            "sha256": sha256(path),
        },
    )
    return path
