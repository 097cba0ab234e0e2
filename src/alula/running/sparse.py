"""What a cell keeps of a sparse decoder: how its feed-forward networks share out each task's tokens after the last task."""

from pathlib import Path

import torch
from torch import nn

from alula.data.collate import Collator
from alula.data.stream import Stream
from alula.experts.sparse_ffn import SparseFFN, is_sparse
from alula.experts.upcycling import routing_statistics
from alula.files import write_json
from alula.methods import Arm

FILE = "sparse.json"
SAMPLES = 24
"""Test samples per task."""


@torch.no_grad()
def keep_load(model: nn.Module, collator: Collator, stream: Stream, arm: Arm, *, folder: Path) -> None:
    """Writes ``sparse.json``; a model without sparse networks has none.

    Load and confidence are those of use, in which no token is dropped. What is dropped is counted as in training.
    """
    if not is_sparse(model):
        return
    networks = [module for module in model.modules() if isinstance(module, SparseFFN)]
    device = next(model.parameters()).device
    used, trained = [], []
    model.eval()
    for task in stream.tasks:
        batch = {key: value.to(device) for key, value in collator(list(task.test[:SAMPLES])).items()}
        with arm.enter(task), arm.around(batch):
            used.append(routing_statistics(model, batch))
            if any(network.capacity is not None for network in networks):
                _set(networks, is_training=True)
                trained.append(routing_statistics(model, batch))
                _set(networks, is_training=False)
    layers = list(used[0])
    write_json(
        folder / FILE,
        {
            "experts": max(len(network.experts) for network in networks),
            "top_k": networks[0].top_k,
            "capacity": networks[0].capacity,
            "samples_per_task": SAMPLES,
            "tasks": [task.name for task in stream.tasks],
            "layers": layers,
            "load": [[found[layer]["load"] for layer in layers] for found in used],
            "confidence": [[found[layer]["confidence"] for layer in layers] for found in used],
            "dropped": [[found[layer]["dropped"] for layer in layers] for found in trained or used],
        },
    )


def _set(networks: list[SparseFFN], *, is_training: bool) -> None:
    """The mode of the networks alone: what is inside them, and the rest of the model, stays in evaluation mode."""
    for network in networks:
        network.training = is_training
