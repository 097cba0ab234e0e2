"""What a cell keeps of MoME's two mixtures: which encoder counted and which adapter was chosen, task by task."""

from pathlib import Path
from typing import Any

from torch import nn

from alula.adapters import Adapters
from alula.data.collate import Collator
from alula.data.stream import Stream
from alula.evaluation.encoder_shares import encoder_shares
from alula.evaluation.expert_shares import expert_shares
from alula.files import write_json
from alula.methods import Method
from alula.models.composed import ComposedVLM
from alula.models.vision_mixture import VisionMixture
from alula.training.sharding import is_sharded

FILE = "shares.json"


def keep_shares(method: Method, model: nn.Module, collator: Collator, stream: Stream, *, folder: Path) -> None:
    """Writes ``shares.json``: of a model with several encoders their importance, of a method with routed adapters who was chosen.

    A cell with neither has no such file. Encoders whose weights are spread over processes are left out: they run in a whole forward only.
    """
    found: dict[str, Any] = {}
    if isinstance(model, ComposedVLM) and isinstance(model.connector, VisionMixture) and not is_sharded(model):
        found["encoders"] = encoder_shares(model, collator, stream.tasks)
    adapters = getattr(method, "adapters", None)
    if isinstance(adapters, Adapters) and adapters.config.num_experts > 1:
        found["adapters"] = expert_shares(adapters, model, collator, stream.tasks)
    if found:
        write_json(folder / FILE, found)
