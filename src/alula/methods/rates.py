"""A learning rate that follows from the size of the backbone. It knows no data."""

import math
from collections.abc import Callable

from torch import nn

from alula.experts.sparse_ffn import SparseFFN
from alula.models.anatomy import anatomy, base_model, walk
from alula.training.settings import MM1, TrainSettings

DECAY = 0.1
"""Of a step's rate: the share of each weight that the step takes off."""


def mm1_rate(num_parameters: int) -> float:
    """The peak rate for a backbone of that many parameters (1 or more), embeddings not counted.

    Source: MM1 (McKinzie et al. 2024, https://arxiv.org/abs/2403.09611, sec. 3.4): a line through the best of a grid at 9 M to
    1.2 B parameters, for pre-training with images.

    Example:
        >>> f"{mm1_rate(3_000_000_000):.2e}"
        '5.83e-05'
    """
    return math.exp(-0.4214 * math.log(num_parameters) - 0.5535)


def backbone_size(model: nn.Module) -> int:
    """Parameters of the decoder without embeddings, head and what is attached to it.

    A sparse network counts as the dense one it stands for: MM1 trains its mixtures with the rates of the dense models.
    """
    parts = anatomy(model)
    left_out: set[int] = set()
    for _, module in walk(base_model(model)):
        copies = [module.gate, *list(module.experts)[1:]] if isinstance(module, SparseFFN) else []
        for each in [module] if isinstance(module, nn.Embedding) else copies:
            left_out |= {id(parameter) for parameter in each.parameters()}
    return sum(
        parameter.numel()
        for path, module in walk(base_model(model))
        if parts.part_of(path) == "decoder"
        for parameter in module.parameters(recurse=False)
        if id(parameter) not in left_out
    )


def resolve_rate(settings: TrainSettings, model: nn.Module, *, say: Callable[[str], None] | None = None) -> TrainSettings:
    """`settings` with numbers where they name a rule.

    MM1 decays each weight by 0.1 of the rate in a step. torch's AdamW multiplies its weight decay with the rate, so that it is 0.1.

    Args:
        say: is told the rate and the size that it follows from.
    """
    if settings.learning_rate != MM1:
        return settings
    size = backbone_size(model)
    rate = mm1_rate(size)
    if say is not None:
        say(f"learning_rate mm1: {rate:.3g} for N = {size:,} parameters of the backbone without embeddings; weight decay {DECAY:g} of it.")
    return settings.model_copy(update={"learning_rate": rate, "weight_decay": DECAY})
