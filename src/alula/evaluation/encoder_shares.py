"""Which image encoder counts on which task: the shares and the importance of the encoders that a model mixes."""

from collections.abc import Sequence
from typing import Any

import torch

from alula.data.stream import Task
from alula.evaluation.expert_shares import SAMPLES
from alula.evaluation.generation import BatchMaker, on_device
from alula.models.composed import ComposedVLM


@torch.no_grad()
def encoder_shares(model: ComposedVLM, collator: BatchMaker, tasks: Sequence[Task], *, samples: int = SAMPLES) -> dict[str, Any]:
    """Per task and encoder, means over images of the weight G_i and of the importance |G_i f_i| as a share of all encoders'.

    Only the encoders and connectors run. Tasks without images are left out. Weights alone do not compare encoders: their features
    differ in scale.

    Args:
        model: with several encoders.
        samples: of each task's test split, the first ones with images (1 or more).

    Source: Shen et al., "MoME", figure 4, https://arxiv.org/abs/2407.12709.
    """
    model.eval()
    found: dict[str, Any] = {"encoders": _names(model.config.encoders), "tasks": [], "weights": [], "importance": [], "images": []}
    for task in tasks:
        chosen = [sample for sample in task.test if sample.images][:samples]
        if not chosen:
            continue
        batch = on_device(collator(chosen), model.device)
        features = model.get_image_features(batch["pixel_values"], batch.get("instruction_embedding"))
        assert features.encoder_weights is not None and features.encoder_importance is not None, "several encoders"
        shares = features.encoder_importance / features.encoder_importance.sum(-1, keepdim=True)
        found["tasks"].append(task.name)
        found["weights"].append(features.encoder_weights.mean(0).tolist())
        found["importance"].append(shares.mean(0).tolist())
        found["images"].append(len(shares))
    return found


def _names(encoders: Sequence[dict]) -> list[str]:
    """What tells them apart: the name, the size of the image where that comes twice, the place where both do."""
    names = [str(one["name"]) for one in encoders]
    sized = [
        f"{name} {one['image_size']}" if names.count(name) > 1 and "image_size" in one else name
        for name, one in zip(names, encoders, strict=True)
    ]
    return [f"{name} #{place + 1}" if sized.count(name) > 1 else name for place, name in enumerate(sized)]
