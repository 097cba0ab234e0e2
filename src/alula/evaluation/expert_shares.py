"""Which adapter speaks on which task: the share of samples, or of tokens, that each layer's router gives to each adapter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alula.adapters import Adapters
from alula.data.stream import Task
from alula.evaluation.generation import BatchMaker, on_device
from alula.routers.instruction import Choice

SAMPLES = 24
"""Test samples of each task that are looked at."""


@torch.no_grad()
def expert_shares(
    adapters: Adapters, model: nn.Module, collator: BatchMaker, tasks: Sequence[Task], *, samples: int = SAMPLES
) -> dict[str, Any]:
    """Per task (or group of tasks, as a task), decoder layer and adapter, the share that it was chosen for; a row sums to 1.

    Where routers read tokens, tokens are counted, without padding. The form is that of an entry in ``routing.json``.

    Args:
        samples: of each task's test split, the first ones (1 or more).

    Source: the analysis of Shen et al., "MoME", figures 5 and 6, https://arxiv.org/abs/2407.12709.
    """
    layers = {path: mixture.index for path, mixture in adapters.sites.items()}
    device = next(model.parameters()).device
    model.eval()
    weights = []
    for task in tasks:
        found: dict[int, Tensor] = {}

        def count(path: str, choice: Choice, valid: Tensor, found: dict[int, Tensor] = found) -> None:
            index = choice.index[valid] if choice.index.dim() == 2 else choice.index
            found[layers[path]] = index.bincount(minlength=adapters.config.num_experts) / index.numel()

        batch = on_device(collator(task.test[:samples]), device)
        with adapters.on_prompts(batch), adapters.recording(count):
            model(**{key: value for key, value in batch.items() if key != "labels"})
        weights.append([found[layer].tolist() for layer in layers.values()])
    return {
        "arm": "default",
        "experts": [f"adapter{number}" for number in range(adapters.config.num_experts)],
        "layers": list(layers.values()),
        "tasks": [task.name for task in tasks],
        "weights": weights,
        "samples_per_task": samples,
    }
